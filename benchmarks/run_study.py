"""Train every run of a study, each once, and compare accuracy with compute and seconds.

python benchmarks/run_study.py benchmarks/studies/smoke.toml     # seconds, no download
python benchmarks/run_study.py benchmarks/studies/cifar10_shares_small.toml --jobs 2 --download
python benchmarks/run_study.py benchmarks/studies/cifar10_full.toml --device cuda --download
python benchmarks/run_study.py STUDY.toml --list | --table | --plot     # what is finished

A study is a TOML file: [settings] of all runs, [[conditions]] (data, share of it, augmentation,
network, epochs, ...), each met by all [[methods]] (dense, dense-equal-compute, ssprop; schedule,
selection, dropout, ...), and seeds. A list stands for each of its values. The names and defaults
are those of benchmarks/study/settings.py; unknown ones are refused.

Each run has an id, a digest of all its settings. A finished run is one row of runs.csv and is not
trained again; the same command continues after any interruption, a run from its last epoch.
Several such commands, or --jobs, may work on one study at once. With the same --output a study may
also grow: what is new in it is trained.

exit codes: 0 done, 1 a run failed, 2 an option, a file or a setting is wrong, 130 interrupted
"""

from __future__ import annotations

import sys

from study.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
