"""Our tables of flags against the llama-server that the distribution installs."""

import inspect
import re
from dataclasses import replace

import pytest

from llmstudiod.core import command
from llmstudiod.core.command import ModelFiles, ServerBinary, build_command, can_dry_run, dry_run
from llmstudiod.core.flags import parse_help_flags, parse_known_flags, undecided_flags
from llmstudiod.core.recipe import LoraAdapter, Recipe

# Relative: without tests/__init__.py the absolute name differs between pytest and python -m.
from .host import Host  # noqa: TID252

MODEL = "/root/m.gguf"
TEMPLATE = "/root/template.jinja"
PLAIN = Recipe(id="m", model_path=MODEL)
RECIPES = {
    "plain": PLAIN,
    "everything": Recipe(
        id="m", model_path=MODEL, max_model_len=512, max_num_seqs=2, kv_unified=True, gpus="none", n_gpu_layers=3,
        split_mode="layer", tensor_split=(3.0, 1.5), main_gpu=0, flash_attn=True, n_batch=256, n_ubatch=128,
        cache_type_k="q8_0", cache_type_v="q8_0", threads=2, load_mode="none", cache_ram=16,
        reasoning_format="deepseek", chat_template="chatml", n_cpu_moe=1, override_tensor="exps=CPU",
        draft_model=MODEL, spec_draft_n_max=8, spec_draft_n_min=1, spec_draft_p_min=0.5,
        spec_draft_n_gpu_layers="all", mmproj=MODEL, lora=(LoraAdapter(MODEL, 0.5), LoraAdapter(MODEL)),
    ),
    "speculation": replace(PLAIN, spec_type="ngram-mod", flash_attn=False, n_gpu_layers="all"),
    "embedding": replace(PLAIN, embedding=True, pooling="mean"),
    "rerank": replace(PLAIN, rerank=True, pooling="rank"),
    "template": replace(PLAIN, chat_template_file=TEMPLATE),
}  # fmt: skip
FOR_OTHER_BUILDS = {"--no-webui"}


@pytest.fixture(scope="module")
def binary(host: Host) -> ServerBinary:
    """The installed llama-server and what it says of itself; the files that its flags name are there."""
    host.run("touch", MODEL)
    host.write(TEMPLATE, "{{ messages }}")
    known = parse_known_flags(_said(host, "--completion-bash")) | parse_help_flags(_said(host, "--help"))
    return ServerBinary(("llama-server",), "PATH", known_flags=known)


def test_every_flag_of_the_build_is_decided(host: Host) -> None:
    """No flag of the installed build is in neither table: a newer llama.cpp must be looked through first."""
    assert undecided_flags(_said(host, "--help")) == []


@pytest.mark.parametrize("name", RECIPES)
def test_command_line_is_accepted(host: Host, binary: ServerBinary, name: str) -> None:
    """llama-server's own parser takes what is built for a recipe, and its dry run."""
    for argv in (_argv(RECIPES[name], binary), dry_run(_argv(RECIPES[name], binary))):
        done = host.run(*argv, "--version", check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_build_can_tell_its_memory(binary: ServerBinary) -> None:
    """Before it takes it."""
    assert can_dry_run(binary)


def test_every_flag_is_tried(binary: ServerBinary) -> None:
    """The recipes above make `build_command` emit each flag that its source spells."""
    emitted = {word for recipe in RECIPES.values() for word in dry_run(_argv(recipe, binary))}
    spelled = set(re.findall(r'"(--?[a-z][a-z-]*)"', inspect.getsource(command)))
    assert spelled - emitted == FOR_OTHER_BUILDS


def _argv(recipe: Recipe, binary: ServerBinary) -> tuple[str, ...]:
    files = ModelFiles(
        model=(MODEL,),
        mmproj=recipe.mmproj,
        draft_model=recipe.draft_model,
        chat_template_file=recipe.chat_template_file,
        lora=tuple(adapter.path for adapter in recipe.lora),
    )
    return build_command(recipe, files, binary, socket_path="/run/m.sock", is_sandboxed=False).argv


def _said(host: Host, flag: str) -> str:
    done = host.run("llama-server", flag)
    return done.stdout + done.stderr
