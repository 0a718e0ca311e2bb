"""The plan of a folder: all that its content depends on, so that a run goes on with its own folder alone."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mige_rt.atomic import atomic_file, is_temporary
from mige_rt.errors import InputError
from mige_rt.terminal import report

PLAN_FILE = "plan.json"


def write_plan(out: Path, plan: Mapping[str, Any], allowed: Collection[str] | None = ()) -> None:
    """Begin a folder, or see that it was begun with the same plan.

    Args:
        out: The folder.
        plan: As plain data.
        allowed: Names of files that may be in a folder without a plan; None: all, since earlier versions wrote none.

    Raises:
        InputError: It was begun with another plan, holds something else, or cannot be written.
    """
    path = out / PLAN_FILE
    if path.is_file():
        try:
            earlier = dict[str, Any](json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); give another folder, or remove this one") from error
        # An earlier version's plan lacks what it did not write down yet.
        changed = [name for name in plan if name in earlier and earlier[name] != plan[name]]
        if changed:
            raise InputError(
                f"{out} was begun with another {', '.join(changed)}; give the same as before, or another folder"
            )
        return
    ours = {PLAN_FILE, *(allowed or ())}  # another process may have written it meanwhile
    if out.exists() and not all(is_temporary(file) or file.name in ours for file in out.iterdir()):
        if allowed is not None:
            raise InputError(f"{out} holds something else: give a path that does not exist, or remove it first")
        report(f"{out} was begun by an earlier version, without {PLAN_FILE}: it is taken to be of what is given now")
    try:
        out.mkdir(exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error}): give a path in an existing folder of your own") from error
