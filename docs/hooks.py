"""What mkdocs does with links that leave docs/, which on GitHub lead to the rest of the repository.

They go to ``repo_url``, once mkdocs.yml has one; until then only their text is shown. Pictures are
copied into the site.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown, page, config, files):
    """Called by mkdocs for each page."""
    from mkdocs.structure.files import File

    def add(path):
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))

    return leave_docs(markdown, config.repo_url, add)


def leave_docs(markdown, url, add):
    """Return a page whose links stay within the site.

    Args:
        markdown: Of a page of docs/, not of a folder in it.
        url: Of the repository, or None.
        add: Is called with the path of each picture to copy.
    """

    def replace(link):
        picture, text, path = link.groups()
        if picture:
            add(path)
            return f"![{text}]({path})"
        return f"[{text}]({url.rstrip('/')}/blob/main/{path})" if url else text

    return _LINK.sub(replace, markdown)
