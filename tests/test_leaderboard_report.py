from experiments import leaderboard_report


def test_a_method_below_the_student_alone_is_told(tmp_path):
    values = {name: [1.0, 2.0] for name in leaderboard_report.COLUMNS}
    row = {"teacher": "a", "student": "b", "paper": "", "source": "", **values}
    rows = [
        {**row, "method": "alone", "over_alone": [0.0, 0.0]},
        {**row, "method": "kd", "over_alone": [-0.5, 0.2], "seconds": [None, None]},
        {**row, "method": "teacher", "over_alone": [-1.0, -1.0]},
    ]
    leaderboard_report.write_markdown(rows, "caption", tmp_path / "leaderboard.md")
    alone, kd, teacher = (tmp_path / "leaderboard.md").read_text().splitlines()[4:]
    assert "-0.15 ± 0.49 (below the student alone)" in kd
    assert "below" not in alone + teacher
    assert "| - |" in kd
