"""The public names: all there, all documented, loaded only when they are used."""

import subprocess
import sys

import onebyone as obo


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, onebyone; sys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there_and_documented():
    for name in obo.__all__:
        assert getattr(obo, name) is not None
        if name != "__version__":
            assert getattr(obo, name).__doc__


def test_functions_stay_functions_after_their_modules_are_imported():
    import onebyone.planning
    import onebyone.profiling
    import onebyone.runs  # noqa: F401

    for name in ("profile", "plan", "apply", "shrink", "compare", "train", "distill"):
        assert callable(getattr(obo, name)), name
