"""Rows of compiled programs: only those that a file lacks are compiled."""

from bmjax.bench.lowered import CONTENDERS
from experiments.compiled_rows import compile_missing, read, write

COLUMNS = ("precision", "topology", "model", "job", "contender", "figure")
ORDER = (("bfloat16",), ("v5e:1x1",), ("cnn", "mlp"), ("training", "streamed", "remat"))


def test_what_is_there_is_not_compiled_again(tmp_path):
    path, asked = tmp_path / "rows.csv", []

    def compile_rows(case, contenders):
        asked.append((case[2:], contenders))
        names = ("precision", "topology", "model", "job")
        of_case = dict(zip(names, case, strict=True))
        return [{**of_case, "contender": CONTENDERS[name].name} for name in contenders]

    def work():
        asked.clear()
        cases = [
            ("bfloat16", "v5e:1x1", model, job)
            for model, job in [
                ("mlp", "training"),
                ("cnn", "training"),
                ("cnn", "streamed"),
                ("cnn", "remat"),
            ]
        ]
        list(compile_missing(path, cases, compile_rows, keep))
        return list(asked)

    def keep(path, rows):
        write(path, rows, COLUMNS, ORDER)

    assert work() == [
        (("mlp", "training"), ("bmjax", "linen")),
        (("cnn", "training"), ("bmjax", "linen")),
        (("cnn", "streamed"), ("bmjax",)),
        (("cnn", "remat"), ("bmjax",)),
    ]
    assert work() == []
    keep(path, [row for row in read(path) if row["job"] != "training" or row["model"] != "cnn"])
    assert work() == [(("cnn", "training"), ("bmjax", "linen"))]
    keep(path, [row for row in read(path) if row["contender"] == "plain Linen"])
    assert [contenders for _, contenders in work()] == [("bmjax",)] * 4
