"""One run at a time in a folder, and no lock outlives its process."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from mlip_kernels.train import lock

HOLD = (
    "import pathlib, sys, time\n"
    "from mlip_kernels.train.lock import exclusive\n"
    "with exclusive(pathlib.Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


def test_a_folder_in_use_is_refused_until_its_process_is_gone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            held = f"output: .* in use by another run .process {holder.pid} on "
            with pytest.raises(ValueError, match=held), lock.exclusive(tmp_path):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    with lock.exclusive(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks_is_named_once(tmp_path, monkeypatch):
    def refuse(_file, _kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="cannot be locked"), lock.exclusive(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), lock.exclusive(tmp_path / "file" / "run"):
        pass


def test_errors_of_the_run_keep_their_names(tmp_path):
    with pytest.raises(OSError, match=r"^of the run$") as failure, lock.exclusive(tmp_path):
        raise OSError("of the run")
    assert failure.value.filename is None
