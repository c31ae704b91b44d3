"""Runs the common test suites of transformers and diffusers on the classes of this package, through the adapters here.

`python tests/peers/run.py [--peers FOLDER] [SUITE …]`

A suite is a folder of adapters beside this file, which run as a part of the other project's tests. Those come from
FOLDER (or the environment variable PEERS), which holds transformers.tar.gz and diffusers.tar.gz, else from the
projects' repositories at the installed versions. Each suite runs in a process of its own, as both projects call their
tests `tests`. What does not apply here is in `not_applicable.py`, with the reason; some tests leave themselves out (no
GPU). A table is printed at the end: nothing may fail.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REPOSITORY = "https://github.com/huggingface/{name}"
SUITES = sorted(folder.name for folder in HERE.iterdir() if list(folder.glob("peer_*.py")))


def unpack(name: str, peers: Path | None, target: Path) -> Path:
    """The folder that holds the project's package `tests`, and its sources where tests read them.

    Raises:
        OSError: there is neither an archive nor a repository that can be reached.
    """
    folder = target / name
    if peers is not None:
        archive = peers / f"{name}.tar.gz"
        if not archive.is_file():
            raise OSError(f"{archive} does not exist: --peers (or PEERS) names the folder of the suites' archives")
        with tarfile.open(archive) as file:
            file.extractall(target, filter="data")
    else:
        version = importlib.metadata.version(name)
        clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", f"v{version}", REPOSITORY.format(name=name)]
        if subprocess.run([*clone, str(folder)]).returncode:
            raise OSError(
                f"no tests of {name}: give the folder of their archives (--peers, or PEERS), or a network on which "
                f"{REPOSITORY.format(name=name)} can be cloned"
            )
    if not (folder / "src" / name).exists():
        (folder / "src").mkdir(exist_ok=True)
        (folder / "src" / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    return folder


def run_suite(name: str, peers: Path | None, arguments: list[str]) -> dict[str, dict[str, int]]:
    """Numbers of tests by adapter and outcome."""
    with tempfile.TemporaryDirectory() as target:
        folder, report = unpack(name, peers, Path(target)), Path(target) / "report.json"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(folder), str(HERE), str(ROOT / "tests"), str(ROOT)]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "PEERS_SUITE": name,
            "PEERS_REPORT": str(report),
        }
        adapters = folder / "tests" / "lavit"
        shutil.copytree(HERE / name, adapters, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "plugin", "-W", "ignore"]
        command += ["--noconftest", "-c", str(HERE / "pytest.ini"), "--rootdir", str(folder), "--tb", "short"]
        status = subprocess.run([*command, str(adapters), *arguments], env=environment, cwd=folder).returncode
        if not report.is_file():
            raise OSError(f"the suite {name} did not run (pytest ended with status {status})")
        return json.loads(report.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; by default all")
    beside = ROOT.parent / "shared" / "peers"
    default = os.environ.get("PEERS") or (beside if beside.is_dir() else None)
    parser.add_argument("--peers", type=Path, default=default and Path(default), help="folder of the archives")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="the rest goes to pytest")
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {sorted(unknown)}: there are {SUITES}")
    results = {}
    try:
        for name in options.suites or SUITES:
            results |= run_suite(name, options.peers, options.pytest)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    if not results:
        print("no test was run", file=sys.stderr)
        return 2
    width = max(map(len, results))
    print(f"\n{'suite':{width}}  {'  '.join(next(iter(results.values())))}")
    for name, counts in results.items():
        print(f"{name:{width}}  {'  '.join(f'{count:{len(outcome)}}' for outcome, count in counts.items())}")
    return int(any(counts["failed"] for counts in results.values()))


if __name__ == "__main__":
    sys.exit(main())
