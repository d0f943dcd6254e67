"""What the startup benchmark makes of its measurements; a run of it is `make bench`."""

import numpy as np
import pytest

from benchmarks.startup import (
    MIB,
    Startup,
    drop_from_page_cache,
    peak_bytes,
    plot,
    read_files,
    tabulate,
)

MEASURED = Startup(
    "small",
    weights_bytes=40 * MIB,
    read_s=0.1,
    imports_s=3.0,
    imports_bytes=300 * MIB,
    ready_s=3.2,
    kv_bytes=60 * MIB,
    peak_bytes=410 * MIB,
)


def test_ratios_leave_out_what_importing_takes() -> None:
    assert MEASURED.time_ratio == pytest.approx(2.0)
    assert MEASURED.memory_ratio == pytest.approx(1.1)
    cells = [cell.strip() for cell in tabulate([MEASURED]).splitlines()[-1].split("|")]
    assert (cells[6], cells[7], cells[11]) == ("32.0", "2.0", "1.10")


def test_every_checkpoint_is_plotted() -> None:
    assert len(plot([MEASURED, MEASURED]).axes[0].patches) > 0


def test_files_are_read_whole_after_they_left_the_page_cache(tmp_path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(17 * MIB))
    drop_from_page_cache([file])
    assert read_files([file]) > 0


def test_the_peak_outlives_what_was_touched() -> None:
    touched = np.ones(64 * MIB, np.uint8)
    during = peak_bytes("self")
    del touched
    assert during >= 64 * MIB
    assert peak_bytes("self") > during - MIB  # the kernel counts pages in batches
