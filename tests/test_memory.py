"""Memory that is freed is fetched anew from the system, but for where it is kept."""

import platform
import subprocess
import sys
import textwrap

import pytest

from pullback import keep_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc of glibc")

BEGIN = """
    import resource, torch
    from pullback import integrated_gradients, keep_memory
    from pullback._core.batching import chunks

    def fetched(parts):
        '''Fetch pages, in megabytes, for 20 times a tensor of 64 MB beside one of 16 MB.'''
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in parts:
            torch.ones(2**24), torch.ones(2**22)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20

    def held():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
"""


def in_a_process_of_its_own(text):
    text = textwrap.dedent(BEGIN) + textwrap.dedent(text)
    got = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr


def test_memory_is_kept_for_a_while():
    in_a_process_of_its_own("""
        assert fetched(range(20)) > 20 * 64
        start = held()
        with keep_memory():
            assert held() < start + 4  # what is kept is what was used
            assert fetched(range(20)) < 2 * 80
            assert held() > start + 60
    """)


def test_a_method_by_itself_keeps_nothing():
    """What keeps memory changes the allocator of the whole process, so that it takes a caller's word."""
    in_a_process_of_its_own("""
        integrated_gradients({}, torch.nn.Linear(3, 2), torch.ones(4, 3), 0, steps=20, chunk_size=1)
        assert fetched(chunks(20, 1)) > 20 * 64
    """)


def test_it_is_kept_while_a_command_runs():
    in_a_process_of_its_own("""
        from pullback import cli

        cli.list_methods = lambda arguments: int(fetched(range(20)))
        assert cli.main(["methods"]) < 2 * 80
    """)


def test_what_is_no_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="`up_to` must be a number of bytes, got -1"), keep_memory(-1):
        pass


def test_a_process_that_may_have_no_more_goes_on():
    in_a_process_of_its_own("""
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20, -1))
        with keep_memory():
            assert fetched(range(20)) < 2 * 80
        torch.ones(2**26)
    """)
