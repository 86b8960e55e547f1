"""`twinflow report`: the page of a run, where it is asked for."""

from helpers.finished_runs import finished_run, kept_run

from twinflow.cli import main


def test_the_page_goes_into_the_run_or_where_it_is_asked_for(tmp_path, capsys):
    run = finished_run(tmp_path / "run", steps=1)
    for arguments, path in (([], run / "report.html"), (["--out", str(tmp_path / "a.html")], tmp_path / "a.html")):
        assert main(["report", str(run), *arguments]) == 0
        assert capsys.readouterr().out == f"{path}\n"
        page = path.read_text()
        assert page.lower().startswith("<!doctype html>") and "twinflow_target_step_count" in page


def test_mistakes_have_a_line_and_status_two(tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none")], str(tmp_path / "none")),
        ([str(kept_run()), "--out", str(tmp_path / "none" / "a.html")], "to must be a file in a folder that exists"),
    ):
        assert main(["report", *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().split("\n")
        assert line.startswith("twinflow report: ") and message in line
    assert not list(tmp_path.rglob("*.html"))
