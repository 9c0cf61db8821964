"""The CSV log survives interruption."""

from mlip_kernels.train import logs


def test_rows_come_back(tmp_path):
    log = logs.Logs(tmp_path, first_step=1)
    log.write(10, {"loss": 0.1 + 0.2, "norm": 1e-9})
    log.close()
    assert logs.read(tmp_path / "metrics.csv") == [(10, "loss", 0.1 + 0.2), (10, "norm", 1e-9)]


def test_resuming_drops_rows_after_the_checkpoint_and_an_unfinished_row(tmp_path):
    log = logs.Logs(tmp_path, first_step=1)
    for step in (10, 20, 30):
        log.write(step, {"loss": float(step)})
    log.close()
    with log.path.open("a") as file:
        file.write("40,lo")
    resumed = logs.Logs(tmp_path, first_step=21)
    resumed.write(30, {"loss": 31.0})
    resumed.close()
    assert logs.read(log.path) == [(10, "loss", 10.0), (20, "loss", 20.0), (30, "loss", 31.0)]
