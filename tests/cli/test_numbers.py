"""Every numeric flag at its edges, in one process: refused with code 2, or honoured (zero included)."""

import json
import signal

import pytest

from nexus_cli.main import main

NEVER = ("inf", "-inf", "NaN", "nan", "9223372036854775808", "", " ", "x", "１", "0x10", "1_000", "1e400", "--", "-1",
         "1,5")
# flag: (values that are fine, values that are not)
SAMPLE = {
    "--num": (("1", "3"), ("0", "1e3", "1.0", "1000001")), "--seed": (("0", "9223372036854775807", "random"), ("1e3",
                                                                                                               "0.5")),
    "--width": (("1", "65536"), ("0", "1e3", "65537")), "--height": (("1", "65536"), ("0", "1e3", "65537")),
    "--steps": (("1", "100000"), ("0", "1e3", "100001")), "--guidance": (("0", "1e3", "0.0", "7.5", ".5"), ("1001",)),
    "--guidance-rescale": (("0", "1", "0.7"), ("1.1", "1e3")), "--eta": (("0", "1", "1e-3"), ("1.5", "1e3")),
    "--batch-size": (("1", "7"), ("0", "1e3")), "--preview-every": (("1",), ("0", "1e3")),
    "--max-time": (("90", "90s", "1.5", "2h", "1h30m", "1d"), ("0", "1e3", "5w", "400d", "s")),
    "--size": (("64x48",), ("0x1", "64", "64*48", "64x", "1e3x1", "x")),
    "--seeds": (("0-9,42", "7"), ("3-1", "1,1", "0-9999999", "1-", "a", "1e3", ",")),
    "--grid": (("auto", "2x3"), ("0x1", "2", "1e3x1")),
    "--guidance-interval": (("0-1", "0.1,0.9", "0,0"), ("0.9-0.1", "0.5", "0-2", "1e3-1")),
}
TRAIN = {
    "--steps": (("1", "1000000000"), ("0", "1e3")), "--seed": (("0", "9223372036854775807"), ("1e3", "random")),
    "--batch-size": (("1",), ("0", "1e3")), "--accumulate": (("1",), ("0", "1e3")), "--lr": (("1e-4", "0.1"), ("0",
                                                                                                               "1e3")),
    "--ema": (("0", "0.999"), ("1", "1e3")), "--save-every": (("1",), ("0", "1e3")),
    "--sample-every": (("0", "1"), ("1e3",)), "--keep": (("1",), ("0", "1e3")),
    "--max-time": (("90",), ("0", "1e3")),
}


@pytest.fixture(autouse=True)
def restored():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


MODEL = ("sample", "dit", "-p", "cat", "--sampler", "ddim")         # it takes all of these flags
BEYOND = {("--width", "1"): "multiples", ("--height", "1"): "multiples", ("--steps", "100000"): "noise chain"}


def code_of(arguments) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in arguments])
    return end.value.code


def refused(flags: dict) -> list[tuple[str, str]]:
    return [(flag, value) for flag, (good, bad) in flags.items() for value in (*bad, *NEVER)
            if value not in good and (flag, value) != ("--seeds", "1,5")]


@pytest.mark.parametrize("flag,value", refused(SAMPLE))
def test_sample_refuses(tmp_path, capsys, flag, value):
    assert code_of(["sample", "ddpm", f"{flag}={value}", "--dry-run", "-o", f"{tmp_path}/"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("flag,value", refused(TRAIN))
def test_train_refuses(tmp_path, capsys, flag, value):
    assert code_of(["train", "ddpm", "--data", tmp_path, "--run", tmp_path / "r", f"{flag}={value}"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("flag,value", [(flag, value) for flag, (good, _) in SAMPLE.items() for value in good])
def test_sample_accepts(tmp_path, capsys, flag, value):
    more = ["-N", 5] if flag == "--grid" and value != "auto" else []
    said = BEYOND.get((flag, value))                # within the flag's range, and not what this model can do
    code = code_of([*MODEL, f"{flag}={value}", "--dry-run", "--json", "-o", f"{tmp_path}/", *more])
    out, err = capsys.readouterr()
    if said is None:
        assert code == 0 and json.loads(out.splitlines()[0])["status"] == "planned"
    else:
        assert code == 2 and said in err


@pytest.mark.parametrize("flag,key,value", [
    ("--guidance", "guidance", 0.0), ("--eta", "eta", 0.0), ("--guidance-rescale", "guidance_rescale", 0.0),
])
def test_zero_is_a_value(tmp_path, capsys, flag, key, value):
    assert code_of([*MODEL, flag, 0, "--seed", 0, "--dry-run", "--json", "-o", f"{tmp_path}/"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"][key] == value and plan["seed"] == 0


def test_seeds_wrap_and_count_up(tmp_path, capsys):
    assert code_of(["sample", "ddpm", "-s", 2**63 - 1, "-N", 2, "--dry-run", "--json", "-o", f"{tmp_path}/"]) == 0
    assert [json.loads(line)["seed"] for line in capsys.readouterr().out.splitlines()] == [2**63 - 1, 0]
    assert code_of(["sample", "ddpm", "--seeds", "0-2,42", "--dry-run", "--json", "-o", f"{tmp_path}/"]) == 0
    assert [json.loads(line)["seed"] for line in capsys.readouterr().out.splitlines()] == [0, 1, 2, 42]
