"""Good files of every format give no problem; a fault planted in one is found, with place, field and remedy, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.planted import LAYOUTS, ROWS, Layout, file_of, make_media, rows_for
from tests.planted_faults import CASES, MAX_LENGTH, Planted, plant, plant_absent_column, plant_orphan
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_media(tmp_path_factory.mktemp("planted") / "root")


@pytest.fixture(scope="module", autouse=True)
def tables_aside(tmp_path_factory: pytest.TempPathFactory):
    """Arrow files of `datasets` go where the test's other files are."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("arrow")))
        yield


@pytest.fixture(scope="module")
def settings():
    """What the shipped model's processor counts, with a limit that all good rows keep."""
    from metamorph.data.lengths import CountedLengths
    from metamorph.data.row_checks import CheckSettings
    from metamorph.microworld.components import shipped
    from metamorph.model.processing import MetaMorphProcessor

    return CheckSettings(CountedLengths(MetaMorphProcessor.from_pretrained(shipped("metamorph"))), MAX_LENGTH)


def report_of(path: Path, settings=None):
    from metamorph.data.check import check
    from metamorph.data.source import open_source

    return check(open_source(path, whole_files=False), settings)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
def test_a_thousand_good_rows_give_no_problem(layout: Layout, root: Path):
    report = report_of(layout.write(file_of(layout, root, "good"), rows_for(layout, 1000)))
    assert [str(fault) for fault in report.faults] == []
    assert (report.rows, report.checked, sum(report.kinds.values())) == (1000, 1000, 1000)


@pytest.mark.parametrize(("layout", "fault"), CASES, ids=lambda one: one.name)
def test_a_planted_fault_is_found_and_nothing_else(layout: Layout, fault: Planted, root: Path, settings):
    path, place = plant(layout, fault, root)
    report = report_of(path, settings if fault.is_of_length else None)
    found = [(one.code, one.place, one.field) for one in report.faults]
    assert found == [(fault.code, place, fault.field(layout))], "\n".join(map(str, report.faults))
    (one,) = report.faults
    assert one.found and one.expected and one.remedy
    assert str(one).startswith(f"{place} {fault.field(layout)}: " if fault.field(layout) else f"{place}: ")
    assert str(one).endswith(f" but {one.expected}. {one.remedy}")


@pytest.mark.parametrize("caption", [True, False], ids=["caption", "image"])
def test_an_orphan_in_a_tar_is_found(caption: bool, root: Path, settings):
    path, place = plant_orphan(root, caption=caption)
    (fault,) = report_of(path, settings).faults
    assert (fault.code, fault.place) == ("orphan", place)
    assert ("an image" if caption else "a .txt") in fault.expected
    assert fault.remedy


def test_a_table_without_its_images_is_one_problem(root: Path, settings):
    path = plant_absent_column(root)
    (fault,) = report_of(path, settings).faults
    assert (fault.code, fault.place, fault.field) == ("column-missing", str(path), "image")
    assert "id, messages" in fault.found and "--columns" in fault.remedy


def test_the_command_names_them_too(root: Path):
    from metamorph.cli.main import app

    layout = LAYOUTS["llava-jsonl"]
    fault = next(fault for where, fault in CASES if where is layout and fault.name == "name that differs by case")
    path, place = plant(layout, fault, root)
    shown = CliRunner().invoke(app, ["data", "check", str(path)])
    assert shown.exit_code == 1
    assert f"{place} image[0]: image path 'case.png' but the file is called 'Case.png'. Write the name as the file has it." in shown.output
    good = layout.write(file_of(layout, root, "good-few"), rows_for(layout, ROWS))
    shown = CliRunner().invoke(app, ["data", "check", str(good), str(path), "--json", "-"])
    assert shown.exit_code == 1
    first, second = json.loads(shown.stdout)["sources"]
    assert first["problems"] == []
    assert [problem["code"] for problem in second["problems"]] == ["image-case"]
    shown = CliRunner().invoke(app, ["data", "check", str(good)])
    assert (shown.exit_code, "No problems" in shown.output) == (0, True)
