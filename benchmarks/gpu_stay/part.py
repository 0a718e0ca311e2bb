"""A part's process: `python -m benchmarks.gpu_stay.part JOB`, which `benchmarks.gpu_stay` starts."""

import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_stay.record import Record, Stay

# Imported when the part runs, since not every machine has what each needs.
MODULES = {
    "machine": "machine",
    "tests": "machine",
    "capture": "capture",
    "serving": "serving",
    "ordering": "ordering",
    "denoiser": "denoiser",
    "matrices": "denoiser",
    "image": "images",
    "published": "images",
}


def main() -> None:
    job = json.loads(sys.argv[1])
    stay = Stay(**{**job, "out": Path(job["out"])})
    record = Record(stay.out / f"{stay.part}.json")
    record.write()
    try:
        if ":" in stay.device:
            import_module("torch").cuda.set_device(stay.device)
        module = import_module(f"benchmarks.gpu_stay.{MODULES[stay.part]}")
        getattr(module, f"measure_{stay.part}")(stay, record)
    except ImportError as error:
        record.write(status="skipped", reason=f"it needs a package that is not here ({error})")
        return
    record.write(status=record.status)


if __name__ == "__main__":
    main()
