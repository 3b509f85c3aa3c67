"""Batch files: 40 kinds of bad line in three formats, traversal, identities, and what is planned (no model needed)."""

import json
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.errors import NexusError
from nexus_cli import jobs as planning
from nexus_cli.batch import read_rows
from nexus_cli.main import main

ASKED = planning.Asked("ddpm", "ddpm", {}, None, None, 1, None, None)
JSON_BAD = [
    "{", "[]", "1", '"a"', "null", "true", "{,}", '{"prompt": "a",}', "{'prompt': 'a'}", '{"prompt": "a"} x',
    '{"prompt": "a"}{"prompt": "b"}', '{"prompt": 1}', '{"prompt": ["a"]}', '{"promt": "a"}',
    '{"prompt": "a", "prompt": "b"}',
    '{"steps": NaN}', '{"steps": Infinity}', '{"steps": 1e400}', '{"steps": -1}', '{"steps": 0}', '{"steps": 1.5}',
    '{"steps": true}', '{"steps": "x"}', '{"steps": []}', '{"steps": {}}', '{"guidance": -0.1}', '{"guidance": "inf"}',
    '{"eta": 2}', '{"sampler": "nothing"}', '{"width": 99999999}', '{"seed": -1}', '{"seed": 1.5}',
    '{"seed": 9223372036854775808}', '{"seed": "１"}', '{"num": 0}', '{"num": "1e3"}', '{"id": ""}', '{"id": []}',
    '{"output": 1.5}', '{"image": "none.png"}', '{"image": "a\\u0000b"}', '{"guidance_interval": "0.5"}',
    '{"guidance_interval": [0, "x"]}', "[" * 100_000, '{"a":' * 5000, '{"prompt": "' + "x" * 10_001 + '"}',
    '{"strength": 2}',
    '{"prompt": "a\tb"}', '{"prompt": "\x01"}',
]


def problem(path, **more) -> str:
    """The message of the first error of a batch file, planned or read."""
    try:
        rows = read_rows(str(path))
        planning.of_rows(ASKED._replace(**more), rows, (str(path), "b"), keep_bad=False)
    except NexusError as error:
        return f"{error.code} {error}"
    return ""


@pytest.mark.parametrize("line", JSON_BAD)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "b.jsonl"
    path.write_text('{"prompt": "ok"}\n\n' + line + '\n{"prompt": "ok 2"}\n')
    assert problem(path).startswith(f"3 {path}:3: ")
    kept, _ = planning.of_rows(ASKED, read_rows(str(path)), (str(path), "b"), keep_bad=True)
    assert [bool(job.error) for job in kept] == [False, True, False]


@pytest.mark.parametrize("text", [
    b"prompt,prompt\na,b\n", b"prompt,steps\na,x\n", b"promt\na\n", b"prompt\na,b\n", b'prompt\n"a\n',
    b"prompt,seed\na,-1\n",
    b"prompt,steps\na,1e3\n", b"prompt,guidance\na,nan\n", b"prompt\n", b"", b"\xff\xfe\n",
    b"prompt,output\na,../x.png\n",
])
def test_bad_tables(tmp_path, text):
    path = tmp_path / "b.csv"
    path.write_bytes(text)
    assert problem(path).startswith("3 ")


@pytest.mark.parametrize("name,text,prompts", [
    ("b.txt", "a\n\n b \n", ["a", "b"]), ("b.txt", "a\r\nb", ["a", "b"]), ("b.txt", "\ufeffa\n", ["a"]), ("b.txt",
                                                                                                          "a\0b\n",
                                                                                                          ["ab"]),
    ("b.txt", "{\n", ["{"]), ("b.jsonl", '{"prompt": "a\\nb"}', ["a\nb"]), ("b.jsonl", '\ufeff{"prompt": "a"}\r\n',
                                                                            ["a"]),
    ("b.csv", 'prompt,steps\n"a, ""b""\nc",3\n', ['a, "b"\nc']), ("b.tsv", "prompt\tsteps\na\t\n", ["a"]),
    ("b.csv", "\ufeffprompt\r\na\r\n", ["a"]), ("b.csv", "prompt,steps\na\n", ["a"]), ("b.ndjson",
                                                                                       '{"prompt":"\\ud800"}', ["?"]),
    ("b.txt", "a\x0cb\u2028c", ["ab\u2028c"]),
])
def test_good_files(tmp_path, name, text, prompts):
    path = tmp_path / name
    path.write_bytes(text.encode())
    rows = read_rows(str(path))
    assert [row.settings["prompt"] for row in rows] == prompts and not any(row.error for row in rows)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["b.jsonl", "b.csv", "b.tsv", "b.txt"]))
def test_any_bytes_give_rows_or_an_error(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    found = problem(path)
    assert found == "" or found.startswith("3 ")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "steps", "seed", "num", "id", "output", "eta", "image", "sampler",
                                        "x"]),
                       st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                                    lambda inner: st.lists(inner, max_size=2), max_leaves=3), max_size=4))
def test_any_row_gives_a_plan_or_an_error(tmp_path_factory, row):
    path = tmp_path_factory.getbasetemp() / "row.jsonl"
    path.write_text(json.dumps({**row, "num": row.get("num") if not isinstance(row.get("num"),
                                                                               int) else row["num"] % 9}))
    found = problem(path)
    assert found == "" or found.startswith("3 ")


@pytest.mark.parametrize("output", ["../a.png", "/tmp/a.png", "a/../../b.png", "C:\\a.png", "C:/a.png",
                                    "\\\\h\\a.png", "~/a.png",
                                    "con.png", "a.png.", "a\u202egnp.png", ".a.png", "a.exe", "a", "x" * 300 + ".png",
                                    "a/.png",
                                    "%2e%2e/../a.png", "-a.png", "a\nb.png"])
def test_a_row_cannot_leave_the_output_folder(tmp_path, output):
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps({"output": output}))
    assert problem(path, output=f"{tmp_path}/out/").startswith(f"3 {path}:1: output")


def test_a_link_in_the_output_folder_is_not_followed_outside(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"output": "link/a.png"}')
    assert "symbolic link" in problem(tmp_path / "b.jsonl", output=f"{tmp_path}/out/")


@pytest.mark.parametrize("lines,said", [
    (['{"id": "a"}', '{"id": "a"}'], "same id"), (['{"output": "a.png"}', '{"output": "a.png", "seed": 1}'],
                                                  "same output"),
    (['{"output": "a-0.png"}', '{"output": "a.png", "num": 2}'], "same output"),
    (['{"id": "a/b"}', '{"id": "a:b"}'], "same output"), (['{"image": "in.png", "output": "in.png"}'], "is an input"),
])
def test_collisions_are_found_before_anything_is_made(tmp_path, lines, said):
    (tmp_path / "in.png").write_bytes(b"")
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    assert said in problem(tmp_path / "b.jsonl", output=f"{tmp_path}/")


def plan(tmp_path, lines, **more):
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return planning.of_rows(ASKED._replace(**more), read_rows(str(path)), (str(path), "b"), keep_bad=False)[0]


def test_identity_is_what_is_asked_for_not_where_it_stands(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "steps": 3}, {"prompt": "a"}, {"prompt": "c", "num": 2}]
    before = {job.id: (job.path, job.seed, job.settings) for job in plan(tmp_path, rows)}
    after = {job.id: (job.path, job.seed, job.settings) for job in plan(tmp_path, [{"prompt": "new"}, *reversed(rows)])}
    assert len(before) == 5 and len(after) == 6 and before.items() <= after.items()


def test_the_row_wins_over_the_flags(tmp_path):
    jobs = plan(tmp_path, [{"prompt": "a", "steps": 3}, {"prompt": "b", "seed": 0, "num": 1}], num=2, seed=7,
                settings={"steps": 9, "eta": 0.0})
    assert [(job.settings["prompt"], job.settings["steps"], job.settings["eta"], job.seed) for job in jobs] == [
        ("a", 3, 0.0, 7), ("a", 3, 0.0, 8), ("b", 9, 0.0, 0)]


def test_paths_are_relative_to_the_batch_file(tmp_path, monkeypatch):
    (tmp_path / "in.png").write_bytes(b"")
    monkeypatch.chdir("/")
    assert plan(tmp_path, [{"image": "in.png"}])[0].settings["image"] == str(tmp_path / "in.png")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60), st.integers(1, 9))
def test_shards_are_disjoint_and_complete(count, parts):
    jobs = [planning.Job(str(i), {}, i, i, None) for i in range(count)]
    pieces = [planning.shard(jobs, (i, parts), None, lambda job: True) for i in range(parts)]
    assert sorted(job.n for piece in pieces for job in piece) == list(range(count))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_a_limit_counts_what_is_left():
    jobs = [planning.Job(str(i), {}, i, i, None) for i in range(10)]
    kept = planning.shard(jobs, None, 2, lambda job: job.n > 3)
    assert [job.n for job in kept] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("output,root,exact", [
    (None, "outputs", False), ("a.png", ".", True), ("o/a.png", "o", True), ("o/", "o", False), ("o/{n}.png", "o",
                                                                                                 False),
    ("{seed}.{ext}", ".", False), ("o-{n}/a.png", ".", False), ("/x/y-%03d.webp", "/x", False), ("a.{ext}", ".", True),
    ("{{a}}/", "{{a}}", False),
])
def test_places(output, root, exact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = planning.place(output)
    assert (str(found.root), found.exact) == (root, exact)


def test_the_plan_names_every_item(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"steps": 0}\n{"prompt": "b", "output": "x/y.png"}\n')
    before = signal.getsignal(signal.SIGTERM)
    for more, code, statuses in (([], 3, []), (["--on-error", "continue"], 7, ["planned", "failed", "planned"])):
        with pytest.raises(SystemExit) as end:
            main(["sample", "mmdit", "-b", "b.jsonl", "--dry-run", "--json", *more])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert (end.value.code, [line["status"] for line in lines]) == (code, statuses)
    assert lines[2]["path"] == "outputs/b/x/y.png" and sorted(p.name for p in tmp_path.iterdir()) == ["b.jsonl"]
    signal.signal(signal.SIGTERM, before)


def test_the_plan_names_what_the_model_would_refuse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"width": 64}\n{"width": 63}\n{"prompt": "!"}\n{"image": "b.jsonl"}\n')
    for more, code, statuses in ((["--on-error", "stop"], 2, []), ([], 7, ["planned"] + 3 * ["failed"])):
        with pytest.raises(SystemExit) as end:
            main(["sample", "flow", "-b", "b.jsonl", "--dry-run", "--json", *more])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert (end.value.code, [line["status"] for line in lines]) == (code, statuses)


def test_a_table_that_cannot_be_read_on_says_that_its_rest_is_lost(tmp_path):
    (tmp_path / "b.csv").write_text('prompt,steps\na,1\n"b" x,2\nc,3\n')
    good, bad = read_rows(str(tmp_path / "b.csv"))
    assert good.settings == {"prompt": "a", "steps": 1} and "b.csv:3: not a table row" in str(bad.error)
    assert "the lines after it were not read" in str(bad.error)


def test_lists_in_the_cells_of_a_table(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    path = tmp_path / "b.csv"
    path.write_text('prompt,guidance_kind,apg,perturb_layers,lora,guidance_interval\n'
                    'x,apg,"0, 15, -0.5",,,\ny,slg,,"2,3","a.safetensors:0.5,b.safetensors",0.1-0.8\nz,apg,"0,15",,,\n')
    one, two, bad = read_rows(str(path))
    assert one.settings["apg"] == [0, 15, -0.5] and two.settings["perturb_layers"] == [2, 3]
    assert two.settings["lora"] == [str(tmp_path / "a.safetensors:0.5"), str(tmp_path / "b.safetensors")]
    assert two.settings["guidance_interval"] == [0.1, 0.8] and "apg" in str(bad.error)
