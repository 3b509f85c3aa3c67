"""Prompts and labels as conditions."""

import pytest
import torch

from nexus.text.conditioner import LabelCondConfig, TextCondConfig, dropped, joined
from nexus.text.encoder import TextEncoderConfig, letter_groups

CPU = torch.device("cpu")
ENCODER = TextEncoderConfig(dim=16, depth=1, buckets=64, length=6)


def text_conditioner():
    torch.manual_seed(0)
    config = TextCondConfig(encoder=ENCODER, style_dropout=0.0)
    return config.adapt(("red apple", "cat"), ("noto", "flat")).build().eval()


def test_the_null_of_a_label_is_the_id_after_the_last():
    conditioner = LabelCondConfig(default_style="flat").adapt(("red apple", "cat"), ("noto", "flat")).build()
    cond, notes = conditioner.prompts(["cat", None, "red apple, noto style"], CPU)
    assert cond["label"].tolist() == [1, 2, 0] and cond["style"].tolist() == [1, 2, 0]
    assert notes[1] == {} and notes[0] == {"class": "cat", "exact": True, "style": "flat"}


@pytest.mark.parametrize("styles", [(), ("flat", "3d")])
def test_a_default_style_that_the_data_lack_is_none(styles):
    """The embedded models' default is one of the emoji's styles; whoever trains on other pictures has none of them."""
    labels = LabelCondConfig.parse(LabelCondConfig.presets["emoji"]).adapt(("cat", "dog"), styles).build()
    cond, notes = labels.prompts(["dog"], CPU)
    assert cond["label"].tolist() == [1] and notes[0]["class"] == "dog" and "style" not in notes[0]
    assert not styles or cond["style"].tolist() == [len(styles)]
    words = TextCondConfig(encoder=ENCODER, default_style="noto").adapt(("cat", "dog"), styles).build().eval()
    assert words.prompts(["dog"], CPU)[1][0] == {"caption": "dog"}


def test_a_caption_is_the_same_alone_and_in_a_batch():
    encoder = text_conditioner().encoder
    texts = ["red apple", "", "a long caption of far more words than there are places", "cat, noto style"]
    whole = encoder(texts)
    for i, text in enumerate(texts):
        alone = encoder([text])
        keep = alone["context_mask"][0]
        torch.testing.assert_close(whole["context"][i][keep], alone["context"][0][keep])
        torch.testing.assert_close(whole["pooled"][i], alone["pooled"][0])
        assert torch.equal(whole["context_mask"][i], keep)


def test_words_are_told_apart_and_unknown_ones_are_named():
    conditioner = text_conditioner()
    _, notes = conditioner.prompts(["a zebra of red apple cat things", None], CPU)
    assert notes[0]["unknown"] == ["a", "zebra", "of", "things"] and notes[0]["cut"] == "cat things"
    assert notes[1] == {}
    pooled = conditioner.encoder(["zebra", "zebu", "red", "red red"])["pooled"]
    assert all(not torch.allclose(a, b) for i, a in enumerate(pooled) for b in pooled[:i])


def test_training_names_the_style_and_sampling_the_same_words():
    conditioner = text_conditioner()
    batch = {"caption": ["red apple"], "style": torch.tensor([1])}
    trained = conditioner.training_cond(batch, torch.Generator().manual_seed(0))
    asked, _ = conditioner.prompts(["red apple, flat style"], CPU)
    torch.testing.assert_close(trained["context"], asked["context"])


def test_drop_and_join_act_item_by_item():
    a, b = {"x": torch.ones(3, 2)}, {"x": torch.zeros(3, 2)}
    assert dropped(a, b, torch.tensor([True, False, True]))["x"].sum(1).tolist() == [0, 2, 0]
    assert joined(a, b)["x"].sum(1).tolist() == [2, 2, 2, 0, 0, 0]


def test_letter_groups_are_stable():
    assert letter_groups("cat", 2048) == letter_groups("cat", 2048)
    assert set(letter_groups("cats", 2048)) & set(letter_groups("cat", 2048))


def test_some_labels_come_without_their_style():
    """The style of about that share of a batch is the null, the class never; as drawn from the generator."""
    config = LabelCondConfig(classes=("apple", "cat"), styles=("noto", "flat"), style_dropout=0.25)
    batch = {"label": torch.ones(2000, dtype=torch.int64), "style": torch.zeros(2000, dtype=torch.int64)}
    made = config.build().training_cond(batch, torch.Generator().manual_seed(0))
    assert torch.equal(made["label"], batch["label"])
    assert set(made["style"].tolist()) == {0, 2}
    assert 0.2 < (made["style"] == 2).float().mean() < 0.3
    again = config.build().training_cond(batch, torch.Generator().manual_seed(0))
    assert torch.equal(again["style"], made["style"])
    plain = config.model_copy(update={"style_dropout": 0.0}).build().training_cond(batch, torch.Generator())
    assert torch.equal(plain["style"], batch["style"])
