"""Free memory: the least of what the machine, the container and the process have left."""

import subprocess
import sys

from onebyone.core import memory as free_memory
from onebyone.core.memory import free_bytes


def test_a_container_that_is_smaller_than_the_machine_bounds_it(tmp_path, monkeypatch):
    for name, text in {
        "memory.max": "1000000\n",
        "memory.current": "600000\n",
        "memory.stat": "anon 1\ninactive_file 50000\n",
    }.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(free_memory, "_GROUP", tmp_path)
    assert free_bytes() == 450_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes() > 450_000


def test_a_limit_of_the_process_bounds_it():
    program = (
        "import resource\n"
        "from onebyone.core.memory import free_bytes, _USED\n"
        "used = int(_USED.read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))\n"
        "assert 200_000_000 < free_bytes() <= 300_000_000, free_bytes()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
