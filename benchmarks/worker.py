"""Measure some groups on one backend, in this process.

    KERAS_BACKEND=jax python benchmarks/worker.py --group dense --group block [--quick] [--json FILE]

A group that fails is named at the end; the others run. `run.py` is the command for everything.
"""

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

import measuring

GROUPS = (
    *("dense", "layers", "inference", "block", "convolution", "embedding", "hub", "methods"),  # timings.py
    *("depth", "ranks", "adapters"),  # sweeps.py
    *("serving", "inactive"),  # serving.py
    *("bytes", "memory"),  # sizes.py
    *("products", "startup"),
)


def measure(names: list[str], quick: bool) -> tuple[list[measuring.Record], list[str]]:
    """The records, and the names of the groups that failed."""
    import products
    import serving
    import sizes
    import startup
    import sweeps
    import timings

    functions = {
        **{name: getattr(timings, name) for name in GROUPS[:8]},
        **{name: getattr(sweeps, name) for name in GROUPS[8:11]},
        **{name: getattr(serving, name) for name in GROUPS[11:13]},
        "bytes": sizes.count,
        "memory": sizes.memory,
        "products": products.products,
        "startup": startup.startup,
    }
    records: list[measuring.Record] = []
    failed = []
    for name in names:
        start = time.monotonic()
        try:
            own = list(functions[name](quick))
        except Exception:
            traceback.print_exc()
            failed.append(name)
        else:
            records += own
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return records, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", action="append", choices=GROUPS, help="may be given several times; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--isolated", nargs=2, metavar=("CASE", "VARIANT"), help="used by the group 'memory'")
    arguments = parser.parse_args()
    measuring.pin(os.environ.get("KERAS_BACKEND", "jax"))
    if arguments.isolated:
        import sizes

        case, variant = arguments.isolated
        sizes.isolated(case, variant, arguments.quick)
        return
    records, failed = measure(arguments.group or list(GROUPS), arguments.quick)
    result = {"records": records, "failed": failed, "versions": measuring.versions(), "machine": measuring.machine()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result))
    else:
        print(json.dumps(records, indent=1))
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


if __name__ == "__main__":
    main()
