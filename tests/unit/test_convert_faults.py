"""What conversion refuses, in one sentence, and what it survives: models the other format cannot
express, damaged folders, a full disk, its own end in the middle."""

import io
import json
import re
import resource
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.conversion import to_hf as to_hf_module
from model.conversion import work as work_module
from model.conversion.common import write_model
from model.conversion.config import read_model_config
from model.conversion.from_hf import from_hf
from model.conversion.safetensors_files import INDEX, SafetensorsReader, write_file
from model.conversion.table import Spec
from model.conversion.to_hf import to_hf
from model.conversion.torch_dist import TorchDistReader
from model.conversion.work import Work
from recipes.compose import load_recipe
from recipes.errors import CheckpointError, ConfigError
from tests.unit.conversion import (
    build,
    load,
    model_of,
    options,
    save,
    scramble,
    tensors,
    tensors_equal,
)
from tests.unit.world import fresh_world

MODEL = model_of({"hybrid_layer_pattern": "MEM*E-/*E/*E"})
"""Every kind of layer, and multi-token prediction."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of it, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    with fresh_world():
        network = build(MODEL)
        scramble(network, seed=0)
        save(network, folder, MODEL)
    return folder


@pytest.fixture
def native(saved: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(saved, tmp_path / "native")
    return tmp_path / "native"


@pytest.fixture
def small(saved: Path, tmp_path: Path) -> Path:
    """The same weights in one file of Hugging Face's."""
    to_hf(options(saved, tmp_path / "small"))
    return tmp_path / "small"


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_topk_prob": False}, "always normalises"),
        ({"num_experts_per_tok": 1}, "with one expert a token"),
        ({"n_group": 4, "topk_group": 1}, "best 2 experts"),
        ({"layer_norm_epsilon": 1e-6}, "the gated norm of Mamba"),
        ({"time_step_limit": [0.01, 1.0]}, "does not clamp dt"),
        ({"model_type": "llama"}, "another architecture"),
        ({"mlp_hidden_act": "silu"}, "squared ReLU"),
        ({"use_bias": True}, "no bias"),
        ({"use_conv_bias": False}, "always has a bias"),
        ({"tie_word_embeddings": True}, "two matrices"),
        ({"layers_block_type": ["mamba", "swa"]}, "layers_block_type has swa"),
        ({"head_dim": None}, "lacks head_dim"),
        ({"hidden_size": 64}, "of another shape"),
        ({"num_nextn_predict_layers": 2, "mtp_use_repeated_layer": False}, "missing: mtp.layers.2"),
        ({"num_nextn_predict_layers": 0}, "not in the model: mtp.layers"),
        ({"num_hidden_layers": 4}, "num_hidden_layers=4, but there are 6 layers in MEM.E-"),
        ({"hybrid_override_pattern": "ME|M*E-"}, "is not made of M, *"),
        ({"layers_block_type": 6}, "layers_block_type=6 .* it is not a list"),
        ({"hidden_size": "48"}, 'hidden_size="48" .* not a whole number'),
        ({"layer_norm_epsilon": "1e-5"}, "it is not a number"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
        ({"mtp_num_layers": 0}, "write one of 1 or more"),
        ({"time_step_limit": [0.0]}, "not two numbers"),
        ({"n_group": 4}, "best 2 experts"),
        ({"quantization_config": {}}, "quantised weights"),
        ({"mamba_n_groups": 4}, "mamba_n_groups=4 .* n_groups is another"),
    ],
)
def test_what_megatron_cannot_express_is_refused(
    small: Path, tmp_path: Path, changes: dict[str, Any], reason: str
):
    edit(small, **changes)
    with pytest.raises(CheckpointError, match=reason):
        from_hf(options(small, tmp_path / "native"), print)
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"attention_head_dim": 16}, "head_dim"),
        ({"num_local_experts": 8}, "n_routed_experts"),
        ({"mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_chunk_size": 16}, "n_groups"),
        ({"layer_types": "mamba moe mamba attention moe mlp".split()}, "layers_block_type"),
        ({"n_group": None, "topk_group": None}, ""),
        ({"n_group": 4, "topk_group": 4}, ""),
        ({"mlp_bias": None, "use_bias": None, "moe_latent_size": 24}, "attention_bias"),
    ],
)
def test_other_spellings_of_a_model_are_read(small: Path, changes: dict[str, Any], without: str):
    wanted = read_model_config(small)
    edit(small, **dict.fromkeys([without]), **changes)
    assert read_model_config(small) == wanted


def test_absent_key_value_heads_are_as_many_as_heads(small: Path):
    edit(small, num_key_value_heads=None)
    assert read_model_config(small).num_query_groups == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"moe_router_topk": 1}, "with one expert a token"),
        ({"moe_router_score_function": "softmax"}, "sigmoid scores"),
        ({"moe_router_enable_expert_bias": False}, "always has the bias"),
        ({"layernorm_epsilon": 1e-6}, "the gated norm of Mamba"),
        ({"moe_shared_expert_intermediate_size": None}, "always have a shared expert"),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 1}, "best 2 experts"),
        ({"moe_router_dtype": "fp64"}, "computes in FP32"),
        ({"hybrid_layer_pattern": "MEM*E-M/*E/*E"}, "missing: decoder.layers.6"),
        ({"vocab_size": 100}, "of another shape: embedding"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(
    native: Path, tmp_path: Path, changes: dict[str, Any], reason: str
):
    recipe = json.loads((native / "config.json").read_text())
    recipe["model"] |= changes
    (native / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match=reason):
        to_hf(options(native, tmp_path / "hf"))


def test_a_damaged_description_is_refused_by_name(native: Path, tmp_path: Path):
    file = native / "config.json"
    good = json.loads(file.read_text())["model"]
    for text, reason in (
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json holds no recipe with a model"),
        ('{"model": null}', "config.json holds no recipe with a model"),
        (json.dumps({"model": good | {"hidden_size": None}}), "is no model: Incompatible value"),
        (json.dumps({"model": good | {"mamba_num_groups": 3}}), "mamba_num_groups=3 does not"),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=reason):
            to_hf(options(native, tmp_path / "hf"))
    file.write_text(json.dumps({"model": good}))
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer.json"):
        to_hf(options(native, tmp_path / "hf", tokenizer=str(tmp_path / "tokenizer")))
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json is not valid JSON"):
        to_hf(options(native, tmp_path / "hf", tokenizer=str(tmp_path / "tokenizer")))


def test_special_tokens_are_those_of_the_tokenizer(native: Path, tmp_path: Path):
    """What else an import said follows its weights through the runs that go on from it."""
    hf, given = native / "hf", tmp_path / "given"

    def exported(source: Path, **changes: Any) -> list[Any]:
        target = tmp_path / f"exported{len(list(tmp_path.iterdir()))}"
        to_hf(options(source, target, **changes))
        config = json.loads((target / "config.json").read_text())
        fields = ("bos_token_id", "eos_token_id", "pad_token_id")
        return [*(config[field] for field in fields), config.get("initializer_range")]

    assert exported(native) == [None, None, None, None]
    hf.mkdir()
    (hf / "config.json").write_text('{"eos_token_id": [2, 11], "initializer_range": 0.5}')
    assert exported(native) == [None, [2, 11], None, 0.5]
    given.mkdir()
    words = {"model": {"vocab": {"a": 0, "<s>": 5}}, "added_tokens": [{"id": 77, "content": "<e>"}]}
    (given / "tokenizer.json").write_text(json.dumps(words))
    (given / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (given / "special_tokens_map.json").write_text('{"eos_token": {"content": "<e>"}}')
    assert exported(native, tokenizer=str(given)) == [5, 77, None, 0.5]

    on = tmp_path / "on"
    shutil.copytree(native, on, ignore=lambda *_: ["hf"])
    for before, tokenizer, wanted in (
        (native, hf, [None, [2, 11], None, 0.5]),
        (native, given, [5, 77, None, 0.5]),
        (on, given, [5, 77, None, None]),
        (tmp_path / "gone", given, [5, 77, None, None]),
    ):
        used = {"library": "huggingface", "path": str(tokenizer)}
        edit(on, checkpoint={"load": str(before)}, data={"tokenizer": used})
        assert exported(on) == wanted


def test_each_tensor_is_used_once(small: Path, tmp_path: Path):
    file = small / "model.safetensors"
    whole = load_file(file)
    left_out = "backbone.layers.1.mixer.experts.3.up_proj.weight"
    save_file({k: v for k, v in whole.items() if k != left_out}, file)
    with pytest.raises(CheckpointError, match=f"1 missing: {left_out}"):
        from_hf(options(small, tmp_path / "native"), print)
    save_file(whole | {"backbone.layers.1.mixer.surplus": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="1 not in the model: backbone.layers.1.mixer.surp"):
        from_hf(options(small, tmp_path / "native"), print)
    twice = {"model.embeddings.weight": whole["backbone.embeddings.weight"].clone()}
    save_file(whole | twice, file)
    with pytest.raises(CheckpointError, match="1 not in the model: .*embeddings.weight"):
        from_hf(options(small, tmp_path / "native"), print)


def test_weights_of_several_dtypes_keep_every_bit(small: Path, tmp_path: Path):
    """What one tensor of Megatron's is made of has the widest of their dtypes there."""
    whole = load_file(small / "model.safetensors")
    narrow = {k: v.bfloat16() for k, v in whole.items() if "q_proj" in k or "experts.0." in k}
    save_file(whole | narrow, small / "model.safetensors")
    from_hf(options(small, tmp_path / "native"), print)
    to_hf(options(tmp_path / "native", tmp_path / "hf"))
    back = tensors(tmp_path / "hf")
    assert all(torch.equal(back[k], v.to(back[k].dtype)) for k, v in (whole | narrow).items())
    with fresh_world():
        load(build(MODEL), tmp_path / "native")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file[:-1], "bytes, not"),
        (lambda file: file[:5], "cannot be read"),
        (lambda file: file[:7] + b"\x7f" + file[8:], "cannot be read"),
        (lambda file: file.replace(b'"F32"', b'"F64"'), "is F64; .* F32, BF16, F16$"),
        (lambda file: file.replace(b'"dtype"', b'"dtipe"'), "KeyError: 'dtype'"),
        (lambda file: file.replace(b"[2,3]", b"[2,x]"), "cannot be read"),
        (lambda file: file.replace(b"[2,3]", b"[2,4]"), "does not fit its shape"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
):
    file = tmp_path / "model.safetensors"
    write_file(file, [("x", torch.float32, (2, 3))], [torch.ones(2, 3)])
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{file}.*{reason}"):
        SafetensorsReader(tmp_path)


def test_a_damaged_index_is_refused(tmp_path: Path):
    for text in ("[]", "{}", '{"weight_map": []}', "{"):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=f"{INDEX} cannot be read"):
            SafetensorsReader(tmp_path)
    write_file(tmp_path / "model.safetensors", [], [])
    with pytest.raises(CheckpointError, match="has both"):
        SafetensorsReader(tmp_path)


def test_what_the_file_system_refuses_is_one_sentence(small: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: Not a directory"):
        from_hf(options(small, tmp_path / "file"), print)
    from_hf(options(small, tmp_path / "native"), print)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as full a disk as any
        with pytest.raises(CheckpointError, match="^writing failed"):
            from_hf(options(small, tmp_path / "second"), print)
        with pytest.raises(CheckpointError, match="^writing failed: File too large"):
            to_hf(options(tmp_path / "native", tmp_path / "hf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    from_hf(options(small, tmp_path / "second"), print)
    to_hf(options(tmp_path / "native", tmp_path / "hf"))
    assert tensors_equal(tmp_path / "hf", small)


def test_other_names_that_transformers_wrote_are_read(small: Path, tmp_path: Path):
    from_hf(options(small, tmp_path / "plain"), print)
    whole = load_file(small / "model.safetensors")
    renamed: dict[str, Tensor] = {}
    stacked: set[str] = set()
    for name, value in whole.items():
        name = name.replace("backbone.", "model.").replace("embeddings.", "embedding.")
        before, found, after = name.partition(".experts.")
        if found:
            stacked.add(f"{before}.experts.{after.split('.')[1]}")
        else:
            renamed[name] = value
    renamed |= {k: torch.stack(_in_order(whole, k)) for k in stacked}
    save_file(renamed, small / "model.safetensors")
    from_hf(options(small, tmp_path / "renamed"), print)
    first, second = TorchDistReader(tmp_path / "plain"), TorchDistReader(tmp_path / "renamed")
    assert first.shapes == second.shapes
    for name, shape in first.shapes.items():
        assert torch.equal(first.read(Spec(name, shape)), second.read(Spec(name, shape))), name


def _in_order(whole: dict[str, Tensor], stacked: str) -> list[Tensor]:
    """The experts of a stacked tensor's name, by number."""
    prefix, kind = stacked.replace("model.", "backbone.", 1).rsplit(".", 1)
    return [whole[f"{prefix}.{i}.{kind}.weight"] for i in range(8)]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused_by_name(native: Path, tmp_path: Path, damage: str):
    file = next(native.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage == "gone":
        file.unlink()
    with pytest.raises(CheckpointError, match=re.escape(file.name)):
        to_hf(options(native, tmp_path / "hf"))


@pytest.mark.parametrize("reader", [TorchDistReader, SafetensorsReader])
def test_tensors_are_read_when_their_turn_comes(
    saved: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any
):
    """Of a whole file, no more of them are alive at once than two rows of the table hold."""
    real = reader.read
    alive = most = read = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(self: Any, *where: Any) -> Tensor:
        nonlocal alive, most, read
        tensor: Tensor = real(self, *where)
        weakref.finalize(tensor, gone)
        alive, read = alive + 1, read + 1
        most = max(most, alive)
        return tensor

    monkeypatch.setattr(reader, "read", counted)
    if reader is TorchDistReader:
        to_hf(options(saved, tmp_path / "hf"))
    else:
        from_hf(options(small, tmp_path / "native"), print)
    assert most <= 2 * 5 < read / 5


class Halting(io.FileIO):
    """A file that gives little at a time, as Linux gives 2 GiB at most."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, 1000)) or b""

    def readinto(self, buffer: Any, /) -> int:
        return super().readinto(memoryview(buffer)[:1000]) or 0


def test_pieces_longer_than_one_read(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    to_hf(options(saved, tmp_path / "straight"))
    real = Path.open

    def halting(path: Path, mode: str = "r", buffering: int = -1, **more: Any) -> Any:
        if mode != "rb":
            return real(path, mode, buffering, **more)
        return io.BufferedReader(Halting(path)) if buffering else Halting(path)

    monkeypatch.setattr(Path, "open", halting)
    to_hf(options(saved, tmp_path / "hf"))
    from_hf(options(tmp_path / "hf", tmp_path / "native"), print)
    to_hf(options(tmp_path / "native", tmp_path / "again"))
    monkeypatch.undo()
    assert tensors_equal(tmp_path / "hf", tmp_path / "straight")
    assert tensors_equal(tmp_path / "again", tmp_path / "straight")


def test_a_killed_conversion_goes_on_where_it_was(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Fails in the third file of several; the second try writes only what is left."""
    wanted = options(saved, tmp_path / "hf", shard_gigabytes=1e-4, workers=1)
    real, written = to_hf_module.write_file, list[str]()

    def write(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise OSError("no more")
        real(path, *rest)
        written.append(path.name)

    monkeypatch.setattr(to_hf_module, "write_file", write)
    with pytest.raises(CheckpointError, match="no more"):
        to_hf(wanted)
    assert not (tmp_path / "hf" / "config.json").exists()
    with pytest.raises(CheckpointError, match="unfinished work of another command"):
        to_hf(options(saved, tmp_path / "hf", shard_gigabytes=2e-4))
    first = list(written)
    written[:] = ["", "", ""]
    to_hf(wanted)
    assert len(written) > 4 and not set(first) & set(written)
    monkeypatch.undo()
    to_hf(options(saved, tmp_path / "straight", shard_gigabytes=1e-4))
    assert tensors_equal(tmp_path / "hf", tmp_path / "straight")
    with pytest.raises(CheckpointError, match="is not empty"):
        to_hf(wanted)


@pytest.mark.parametrize("moment", ["begun", "first note", "finishing"])
def test_a_kill_between_two_notes_leaves_a_way_on(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    wanted = options(saved, tmp_path / "hf")
    notes = tmp_path / "hf" / ".conversion"
    if moment == "finishing":
        monkeypatch.setattr(work_module.os, "rename", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            to_hf(wanted)
        monkeypatch.undo()
        assert (notes / "task.json").exists()
    else:
        notes.mkdir(parents=True)
        if moment == "first note":
            (notes / "task.tmp").write_text("{")
    to_hf(wanted)
    assert not notes.exists()
    to_hf(options(saved, tmp_path / "straight"))
    assert tensors_equal(tmp_path / "hf", tmp_path / "straight")


def test_notes_go_at_one_stroke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever is left of them when a kill cuts their deletion short, the folder is finished."""
    work = Work(tmp_path / "target", {})
    monkeypatch.setattr(work_module.shutil, "rmtree", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        work.finish()
    assert not (tmp_path / "target" / ".conversion").exists()


def test_an_interrupt_ends_it_after_the_parts_being_written(tmp_path: Path):
    work, written = Work(tmp_path / "target", {}), list[int]()
    main = threading.get_ident()

    def write(part: int, advance: Callable[[int], object]) -> None:
        if part == 1:  # when the thread has been started
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.02)
        written.append(part)

    # What started the tests may have it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            work.run([1] * 100, write, 1, "writing")
    finally:
        signal.signal(signal.SIGINT, before)
    assert 1 < len(written) < 100
    noted = {int(note.stem) for note in (tmp_path / "target").rglob("*.pickle")}
    assert noted == set(written)


def test_two_commands_at_once(tmp_path: Path):
    """The same command, started twice: the second is refused while the first is at it."""
    target, context = tmp_path / "target", get_context("fork")
    began, end = context.Event(), context.Event()

    def first() -> None:
        work = Work(target, {"task": "any"})
        began.set()
        end.wait(60)
        work.finish()

    process = context.Process(target=first)
    process.start()
    assert began.wait(60)
    with pytest.raises(CheckpointError, match="another command is writing .*/target; wait until"):
        Work(target, {"task": "any"})
    end.set()
    process.join(60)
    assert process.exitcode == 0 and not any(target.iterdir())
    Work(target, {"task": "any"}).finish()


def test_another_model_is_another_command(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Heads of keys and values, differently cut, can have tensors of the same shapes."""
    monkeypatch.setattr(Work, "finish", lambda self: None)
    from_hf(options(small, tmp_path / "native"), print)
    edit(small, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with pytest.raises(CheckpointError, match="unfinished work of another command"):
        from_hf(options(small, tmp_path / "native"), print)


def test_an_imported_model_has_a_name_one_can_choose(small: Path, tmp_path: Path):
    config = small / "config.json"
    for folder, name in (
        ("Super-v1.5", "super_v1_5"),
        ("tiny", "imported_tiny"),
        ("123", "imported_123"),
        ("größe", "gr__e"),
        ("--", "imported"),
    ):
        (tmp_path / folder).mkdir()
        shutil.copyfile(config, tmp_path / folder / "config.json")
        model = read_model_config(tmp_path / folder)
        assert model.name == name
    recipes = write_model(model, tmp_path)
    assert load_recipe(["experiment=tiny", f"model={name}"], recipes).model.name == name


def test_options_are_checked(tmp_path: Path):
    with pytest.raises(ConfigError, match="convert.workers=0"):
        to_hf(options(tmp_path, tmp_path / "hf", workers=0))
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        to_hf(options(tmp_path, tmp_path / "hf"))
    with pytest.raises(CheckpointError, match="give a Hugging Face nemotron_h folder"):
        from_hf(options(tmp_path, tmp_path / "native"), print)
