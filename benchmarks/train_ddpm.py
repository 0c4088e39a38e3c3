"""Train a DDPM dense, with ssProp, and dense at equal compute; compare what they generate.

python benchmarks/train_ddpm.py --device cuda --amp bf16 --channels-last --download --seeds 3
python benchmarks/train_ddpm.py --data-dir FOLDER_OR_ARCHIVE --channels 32 64 --image-size 16 \\
    --share 0.1 --epochs 10 --samples 200 --sample-steps 50 \\
    --feature-network resnet8_narrow --feature-epochs 3
python benchmarks/train_ddpm.py --table --results FOLDER

diffusers' UNet2DModel learns the noise of DDPM with cosine betas; nothing pretrained is loaded.
Each run becomes a row of runs.csv: loss on held-out images (always the same noise and timesteps),
FLOPs and seconds of the training, and a Frechet distance of generated images from test images.
That distance is taken in the features of a classifier trained here on the same data: it is not
the Inception-FID, and cannot be compared with published ones. A grid of samples lies beside it.

A run that has a row is not repeated; after any interruption the same command goes on, at the last
epoch. Several commands with one --output share its runs.

exit codes: 0 done, 2 an option or a file is wrong, 130 interrupted
"""

from __future__ import annotations

import sys

from classifier.options import UserError
from ddpm.settings import parse


def main(arguments: list[str] | None = None) -> int:
    """Run the command line (default: the process's); return the exit code."""
    args = parse(__doc__, arguments)
    try:
        # Imported here, so that --help does not wait for torch.
        from ddpm import runs, settings, table
        from rich.console import Console

        console = Console(width=None if sys.stdout.isatty() else 160)
        if not args.table:
            runs.share_out(args)
        rows = {row["id"]: row for row in runs.rows_of(args.output).read()}
        found = [rows[run.id] for run in settings.runs(args) if run.id in rows]
        if not found:
            raise UserError(f"no run with these options is finished in {args.output}")
        console.print(table.build(found))
        console.print(f"wrote {args.output / 'runs.csv'}", highlight=False, soft_wrap=True)
        if args.results is not None:
            table.write(args.results, found, args.output)
            console.print(f"wrote {args.results}", highlight=False, soft_wrap=True)
        return 0
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}".replace("\n", " "), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
