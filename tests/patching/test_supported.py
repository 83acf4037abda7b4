"""What is said of architectures is what is found: the package's file, docs/models.md, and the models themselves."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")
from support.zoo import __main__, report  # noqa: E402
from support.zoo.entry import results_of  # noqa: E402
from support.zoo.everything import entries  # noqa: E402
from support.zoo.survey import METHODS, Surveyed, differ, options, quiet, surveyed  # noqa: E402
from tokenops import apply_patch, architectures, supported  # noqa: E402
from tokenops.architectures import Supported  # noqa: E402
from tokenops.patching import engine  # noqa: E402

ENTRIES = entries()
COMMITTED = {one[:2]: one for one in supported()}


def quick():
    """A tenth of the list: every sixteenth with a small form, and the first of each kind of outcome."""
    firsts = {}
    for entry in ENTRIES:
        for text in COMMITTED[entry[:2]].methods.values():
            firsts.setdefault((report.sign(text), entry.library), entry[:2])
    return {entry[:2] for entry in [e for e in ENTRIES if not e.bare][::16]} | set(firsts.values())


def cases():
    chosen = quick()
    for entry in ENTRIES:
        marks = () if entry[:2] in chosen else pytest.mark.slow
        yield pytest.param(entry, id=f"{entry.library}-{entry.architecture}", marks=marks)


@pytest.mark.parametrize("entry", list(cases()))
def test_an_architecture_is_as_the_file_says(entry):
    pytest.importorskip(entry.library)
    found, expected = report.found(entry, *surveyed(entry)), COMMITTED[entry[:2]]
    if report.installed()[entry.library] != architectures.tried_with()[entry.library]:
        worked = [method for method, text in expected.methods.items() if report.kind(text) == "works"]
        assert not [method for method in worked if report.kind(found.methods[method]) == "open"], found.methods
        return  # of another version: what worked works, or is refused in words
    assert found.methods == expected.methods, "`make models` says what changed, and writes it"
    assert found.blocks == expected.blocks


def test_the_file_has_the_list_and_every_method():
    assert list(COMMITTED) == [entry[:2] for entry in ENTRIES]
    assert all(tuple(one.methods) and set(one.methods) == set(METHODS) for one in COMMITTED.values())
    assert set(METHODS) == set(engine.METHODS)
    text = report.file_of(COMMITTED.values(), architectures.tried_with())
    assert architectures.FILE.read_text(encoding="utf-8") == text
    assert not [one for one in COMMITTED.values() if report.contradicts(one)]
    assert {entry[:2]: entry.note for entry in ENTRIES} == {key: one.note for key, one in COMMITTED.items()}


def test_the_page_says_what_the_file_says():
    assert report.section(COMMITTED.values()) in report.PAGE.read_text(encoding="utf-8")


def test_a_part_of_a_name_finds_architectures():
    assert {one.library for one in supported("torchvision")} == {"torchvision"}
    [found] = supported("VIT_BASE_PATCH16_ROPE_MIXED_224")
    assert found.blocks == "timm.models.eva.EvaBlock" and found.methods["evo_vit"] == "works"
    assert supported("EvaBlock") and not supported("no such thing")
    with pytest.raises(TypeError, match="supported: name must be a str, but got 3"):
        supported(3)


def test_reading_it_takes_no_library_of_models():
    code = "import sys, tokenops; tokenops.supported(); print({'timm', 'transformers', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def made(**methods):
    return Supported("timm", "a", "Block", methods)


@pytest.mark.parametrize(
    "before, after, lines, worse",
    [
        (dict(tome="works"), dict(tome="works"), [], False),
        (dict(tome="no"), dict(tome="works"), ["timm a, tome: no -> works"], False),
        (dict(tome="works"), dict(tome="no"), ["timm a, tome: works -> no"], True),
        (dict(tome="no"), dict(tome="open: no"), ["timm a, tome: no -> open: no"], False),
        (dict(), dict(tome="works"), ["timm a, tome: not tried -> works"], False),
    ],
)
def test_what_changed(before, after, lines, worse):
    assert report.changes([made(**before)], [made(**after)]) == (lines, worse)
    assert report.changes([made(**before)], []) == (["timm a: gone"], True)
    assert report.changes([], [made(**after)]) == (["timm a: new"], False)


def test_what_is_found_is_printed_and_written(tmp_path, monkeypatch, capsys):
    file, page = tmp_path / "supported.json", tmp_path / "models.md"
    page.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    monkeypatch.setattr(architectures, "FILE", file)
    monkeypatch.setattr(report, "PAGE", page)
    chosen = [e for e in ENTRIES if e.architecture in ("vit_base_patch16_gap_224", "resnet18") and e.library == "timm"]
    monkeypatch.setattr(__main__, "entries", lambda: chosen)
    assert __main__.main([]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("2 architectures: 1 take a method, 1 of them all 8; 1 can take none, 0 take none today.")
    assert "timm resnet18" + 6 * " " in "\n".join(lines) and "Changed: 2" in lines
    assert file.read_text() == report.file_of((COMMITTED[entry[:2]] for entry in chosen), report.installed())
    assert page.read_text() == f"before\n{report.section(COMMITTED[entry[:2]] for entry in chosen)}\nafter\n"
    file.write_text(file.read_text().replace("vit_base_patch16_gap_224", "gone"))
    assert __main__.main(["resnet"]) == 1  # what worked is gone
    assert "  timm gone: gone" in capsys.readouterr().out.splitlines()


def test_a_difference_is_seen():
    import torch

    x = torch.tensor([[1.0, 100.0]])
    assert differ({"y": x}, {"y": x + 5e-4}) is None
    assert differ({"y": x}, {"y": x + 2e-2}) == "result 'y' is off by 0.02"
    assert differ({"y": x}, {"y": x * torch.nan}) == "result 'y' is off by nan"
    assert differ({"y": x}, {"y": x[:, :1]}) == "result 'y' is (1, 2) in place of (1, 1)"
    assert differ({"y": x}, {"z": x}) == "results are y in place of z"


#: a model of each kind of layer of transformers, which is compiled whole
COMPILED = """
AltCLIPVisionModel ASTModel Aimv2VisionModel BeitModel BlipVisionModel Blip2VisionModel DINOv3ViTModel DPTModel
Data2VecVisionModel DeiTModel Dinov2Backbone Dinov2Model Dinov2WithRegistersModel FlavaImageModel IJepaModel
Idefics3VisionTransformer InternVLVisionModel JanusVisionModel OwlViTVisionModel PixioModel ViTMAEModel ViTMSNModel
VitPoseBackbone VivitModel
""".split()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["tome", "evit"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_is_the_model(name, method):
    entry = next(entry for entry in ENTRIES if entry.architecture.partition(",")[0] == name)
    if not COMMITTED[entry[:2]].methods[method].startswith("works"):
        pytest.skip("is refused")
    with quiet():
        subject = Surveyed(entry)
        [(_, _, reducing), *_] = options(method, entry.blocks, entry.patches)
        apply_patch(subject.model, method, **reducing)
        expected = subject.run(subject.inputs)
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(subject.model, fullgraph=True, backend="eager")(**subject.inputs)
        assert differ(results_of(compiled, entry.results), expected) is None
