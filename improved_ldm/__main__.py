"""Run a script of `training/` without a clone: `improved-ldm train_t2i --output_dir runs/x`.

For several processes, use `accelerate launch -m improved_ldm.training.train_t2i --output_dir runs/x`.
"""

import pkgutil
import runpy
import sys
from importlib.util import find_spec

PACKAGE = "improved_ldm.training"


def main():
    """Run the script that the first argument names, with the other arguments."""
    spec = find_spec(PACKAGE)
    if spec is None:
        sys.exit(f"{PACKAGE} is not installed: pip install the package, or run the scripts in training/ of a clone.")
    scripts = sorted(
        module.name for module in pkgutil.iter_modules(spec.submodule_search_locations) if not module.ispkg
    )
    name, *arguments = sys.argv[1:] or [None]
    if name not in scripts:
        sys.exit(f"improved-ldm {name or ''}: the first argument must be one of {', '.join(scripts)}.")
    # the command that a run records in its metrics
    sys.orig_argv = [sys.executable, "-m", f"{PACKAGE}.{name}", *arguments]
    sys.argv = [name, *arguments]
    runpy.run_module(f"{PACKAGE}.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
