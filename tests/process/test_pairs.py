"""Pairs on disk: whole shards or none, the same bytes whatever was cut off, read back row by row."""

import json

import pytest
import torch

from nexus.errors import InputError, OutputError
from nexus.process import pairs
from nexus.process.pairs import PairSet, write_pairs
from nexus.rng import generator

COUNT = 600             # three shards, the last one short


class Pictures:
    """Three pictures with labels."""

    def labels_of(self, indices):
        return {"label": torch.tensor(indices) * 10, "index": torch.tensor(indices)}


def made(numbers):
    noise = torch.stack([torch.randn(2, 2, 2, generator=generator(7, i)) for i in numbers])
    return {"noise": noise, "latent": 2 * noise, "index": torch.tensor([i % 3 for i in numbers])}


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "pairs"
    write_pairs(folder, COUNT, made, {"seed": 7})
    return folder


def test_rows_come_back_in_the_order_asked_for(whole):
    data = PairSet(whole, Pictures())
    assert len(data) == COUNT and len(contents(whole)) == 4
    wanted = [599, 0, 256, 255, 512, 0]
    batch = data.batch(wanted)
    expected = made(wanted)
    assert torch.equal(batch["noise"], expected["noise"]) and torch.equal(batch["latent"], expected["latent"])
    assert batch["label"].tolist() == [10 * (i % 3) for i in wanted]


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_a_making_that_was_cut_off_goes_on_to_the_same_bytes(stop, whole, tmp_path):
    calls = []

    def fragile(numbers):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(numbers[0])
        return made(numbers)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path / "pairs", COUNT, fragile, {"seed": 7})
    if stop < 2:
        with pytest.raises(InputError, match="lacks"):
            PairSet(tmp_path / "pairs", Pictures())
    again = []
    write_pairs(tmp_path / "pairs", COUNT, lambda numbers: again.append(numbers[0]) or made(numbers), {"seed": 7})
    assert calls + again == [0, 256, 512] and contents(tmp_path / "pairs") == contents(whole)


def test_processes_share_the_work(whole, tmp_path):
    seen = []
    for rank in range(2):
        write_pairs(tmp_path / "pairs", COUNT, made, {"seed": 7}, part=(rank, 2),
                    watch=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "pairs") == contents(whole) and (COUNT, COUNT) in seen


@pytest.mark.parametrize(("facts", "word"), [({"seed": 8}, "seed"), ({"seed": 7, "teacher": "x"}, "teacher")])
def test_pairs_of_other_facts_are_refused_by_name(facts, word, whole):
    with pytest.raises(InputError, match=word):
        write_pairs(whole, COUNT, made, facts)


def test_another_number_makes_only_what_is_missing(whole, tmp_path):
    folder, calls = tmp_path / "pairs", []

    def counted(numbers):
        calls.append((numbers[0], len(numbers)))
        return made(numbers)
    for count, expected in ((300, [(0, 256), (256, 44)]), (COUNT, [(256, 256), (512, 88)]), (256, []), (COUNT, [])):
        calls.clear()
        write_pairs(folder, count, counted, {"seed": 7})
        assert calls == expected and len(PairSet(folder, Pictures())) == count      # a short last shard is made anew
    assert contents(folder) == contents(whole)


def test_what_is_no_folder_of_pairs_or_is_damaged_is_refused(whole, tmp_path):
    with pytest.raises(InputError, match="no pairs"):
        PairSet(tmp_path, Pictures())
    (tmp_path / "pairs.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="no pairs"):
        PairSet(tmp_path, Pictures())
    for name, data in contents(whole).items():
        (tmp_path / name).write_bytes(data if name.endswith("json") else data[:-1])
    with pytest.raises(InputError, match="damaged"):
        PairSet(tmp_path, Pictures()).batch([0])
    (tmp_path / "pairs.json").write_text(json.dumps({"count": "many"}))
    with pytest.raises(InputError, match="no pairs"):
        PairSet(tmp_path, Pictures())


def test_a_full_disk_leaves_no_half_shard(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_FAULT", "write:3:ENOSPC")
    with pytest.raises(OutputError, match="disk full"):
        write_pairs(tmp_path / "pairs", COUNT, made, {"seed": 7})
    monkeypatch.delenv("NEXUS_FAULT")
    assert not list((tmp_path / "pairs").glob(".*"))
    write_pairs(tmp_path / "pairs", COUNT, made, {"seed": 7})
    assert contents(tmp_path / "pairs") == contents(whole)


def test_a_fingerprint_is_of_the_weights():
    net, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    other.load_state_dict(net.state_dict())
    assert pairs.fingerprint(net) == pairs.fingerprint(other)
    with torch.no_grad():
        other.bias[0] += 1
    assert pairs.fingerprint(net) != pairs.fingerprint(other)
