"""Times one case against its peer and writes benchmarks/records/CASE.json.

.venv/bin/python benchmarks/run.py dpo [--pairs 5] [--threads 2]
"""

from __future__ import annotations

import argparse
import signal
import sys

import harness


def main() -> None:
    cases = sorted(path.stem.replace("_", "-") for path in (harness.HERE / "cases").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=cases)
    parser.add_argument("--pairs", type=int, default=5, help="how often ours and the peer take turns; a record needs 5 or more")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every side")
    parser.add_argument("--steps", type=int, help="steps in one measurement; default: the case's own")
    parser.add_argument("--warmup", type=int, help="untimed steps before the first pair; default: the case's own")
    parser.add_argument("--no-record", action="store_true", help="print only: for trying things out")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the workers are ended and their folder is removed
    if options.pairs < 5 and not options.no_record:
        parser.error("a record needs 5 pairs or more; with --no-record fewer are allowed")
    record = harness.run(options.case, options.pairs, options.threads, options.steps, options.warmup)
    ratio, peak = record["ratio"], record["peak_memory"]
    print(
        f"{record['case']}: {ratio['median']:.2f}x the speed of {record['peer']['name']} {record['peer']['version']} "
        f"({ratio['min']:.2f} to {ratio['max']:.2f})"
    )
    print(f"share of the limit: {record['limit_share']:.0%}; peak memory: ours {peak['ours']} MiB, peer {peak['peer']} MiB")
    for name in ("ours", "peer_absolute", "limit_absolute"):
        print(f"{name}: {record[name]}")
    for name in (name for name in record if name.endswith("_difference")):
        print(f"{name}: {record[name]:.2e}")
    if not options.no_record:
        print(f"written to {harness.write(record)}")


if __name__ == "__main__":
    main()
