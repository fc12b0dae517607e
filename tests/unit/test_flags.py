"""The table of llama-server's flags against the recorded binary, and how entries of ``extra_args`` become arguments."""

import datetime
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmstudiod.core.flag_table import DENIED_PREFIXES, DENIED_SUFFIXES
from llmstudiod.core.flags import (
    FLAGS,
    RENAMED,
    FlagKind,
    HelpEntry,
    find_flag,
    modernize,
    parse_help,
    parse_help_flags,
    parse_known_flags,
    render_flag,
    undecided_flags,
    why_denied,
)

DATA = Path(__file__).parents[1] / "data"
HELP = (DATA / "llama-server-0.7.0-help.txt").read_text()
COMPLETION = (DATA / "llama-server-0.7.0-completion.txt").read_text()
KNOWN = parse_help_flags(HELP)
ANY = frozenset[str]()

FIELDS = {
    "max_model_len", "max_num_seqs", "kv_unified", "n_gpu_layers", "split_mode", "tensor_split", "main_gpu",
    "flash_attn", "n_batch", "n_ubatch", "cache_type_k", "cache_type_v", "threads", "load_mode", "cache_ram", "mmproj",
    "draft_model", "lora", "chat_template", "chat_template_file", "reasoning_format", "embedding", "rerank", "pooling",
    "n_cpu_moe", "override_tensor", "served_model_name", "model_path", "spec_type", "spec_draft_n_max",
    "spec_draft_n_min", "spec_draft_p_min", "spec_draft_n_gpu_layers",
}  # fmt: skip


# The recorded help and completion


def test_help_is_read_completely() -> None:
    """Every flag of the completion is in what was read from the help: no line of the help was missed."""
    completion = parse_known_flags(COMPLETION)
    assert len(completion) > 300
    assert completion - {name for entry in parse_help(HELP) for name in entry.names} == set()


def test_help_has_what_the_completion_lacks() -> None:
    """Only the help has the negated spellings, and only the help tells which flags were removed."""
    completion = parse_known_flags(COMPLETION)
    assert {"--no-warmup", "-nkvo", "-no-kvu"} <= KNOWN - completion
    assert completion - KNOWN == {
        "--draft", "--draft-n", "--draft-max", "--draft-min", "--draft-n-min",
        "--spec-ngram-size-n", "--spec-ngram-size-m", "--spec-ngram-min-hits",
    }  # fmt: skip


def test_completion_without_flags_is_empty() -> None:
    """A binary that prints something else as its completion knows no flags."""
    assert parse_known_flags("error: invalid argument: --completion-bash") == frozenset()


@pytest.mark.parametrize(
    ("line", "names", "placeholder"),
    [
        ("-ngl,  --gpu-layers, --n-gpu-layers N   max.", ("-ngl", "--gpu-layers", "--n-gpu-layers"), "N"),
        ("--swa-full                              use", ("--swa-full",), ""),
        ("       --swa-full                       use", ("--swa-full",), ""),
        ("--control-vector-layer-range START END", ("--control-vector-layer-range",), "START END"),
        ("-kvo,  --kv-offload, -nkvo, --no-kv-offload", ("-kvo", "--kv-offload", "-nkvo", "--no-kv-offload"), ""),
    ],
)
def test_help_line_gives_names_and_placeholder(line: str, names: tuple[str, ...], placeholder: str) -> None:
    """A line of the help is its spellings, then the placeholder of a value if there is one."""
    assert parse_help(line) == (HelpEntry(names, placeholder, is_removed=False),)


@pytest.mark.parametrize(
    "line", ["----- common params -----", " " * 40 + "--no-mmproj", " " * 40 + "- none: leave", ""]
)
def test_help_prose_is_no_flag(line: str) -> None:
    """Headings and descriptions, even those that begin with a dash, are not flags."""
    assert parse_help(line) == ()


def test_removed_flag_is_seen_on_the_next_line() -> None:
    """A removed flag whose spellings fill their line has its description below."""
    (entry,) = parse_help(
        "--draft-a, --draft-b, --draft-c, --draft-d N\n" + " " * 40 + "the argument has been removed."
    )
    assert entry.is_removed


# The table


def test_every_flag_is_decided() -> None:
    """No flag of the recorded binary is left without a decision."""
    assert undecided_flags(HELP) == []


def test_undecided_flag_is_named() -> None:
    """A flag of a newer build shows up with each of its spellings."""
    assert undecided_flags(HELP + "\n-fot,  --flag-of-tomorrow N             new") == ["--flag-of-tomorrow", "-fot"]


def test_no_spelling_stands_twice() -> None:
    """A spelling belongs to one flag."""
    spellings = Counter(name for flag in FLAGS for name in (*flag.names, *flag.negated))
    assert [name for name, count in spellings.items() if count > 1] == []
    assert spellings.keys() & RENAMED.keys() == set()


def test_table_has_no_flag_that_the_binary_lacks() -> None:
    """Each spelling in the table is accepted by the recorded binary: no slips of the pen."""
    assert {name for flag in FLAGS for name in (*flag.names, *flag.negated)} == KNOWN


def test_spellings_of_one_flag_stand_together() -> None:
    """The table groups spellings as the help does."""
    groups = {frozenset(entry.names) for entry in parse_help(HELP) if not entry.is_removed}
    assert {frozenset((*flag.names, *flag.negated)) for flag in FLAGS} == groups


def test_kinds_agree_with_the_help() -> None:
    """What the help shows with a placeholder takes a value, a flag with a twin is a switch, [on|off] wants a word."""
    for entry in parse_help(HELP):
        if entry.is_removed:
            continue
        found = find_flag(entry.names[0])
        assert found is not None
        assert (found.flag.kind is FlagKind.SWITCH) == (not entry.placeholder), entry
        if entry.placeholder.startswith("[on|off"):
            assert found.flag.kind is FlagKind.ON_OFF_AUTO, entry
        if entry.placeholder == "N" and found.flag.field not in {"n_gpu_layers", "spec_draft_n_gpu_layers"}:
            assert found.flag.kind in {FlagKind.INTEGER, FlagKind.NUMBER}, entry


def test_only_switches_are_negated() -> None:
    """A flag with a value has no --no- spelling, and the long ones are written first."""
    for flag in FLAGS:
        assert not flag.negated or flag.kind is FlagKind.SWITCH
        assert flag.names[0].startswith("--")
        assert not flag.negated or flag.negated[0].startswith("--no-")


def test_fields_are_the_recipes() -> None:
    """Each typed field that has a flag is named, and a flag with a field may be given."""
    assert {flag.field for flag in FLAGS if flag.field} == FIELDS
    assert [flag.names[0] for flag in FLAGS if flag.field and flag.denied] == []


@pytest.mark.parametrize(
    "key",
    [
        "--tools", "tools_runtime", "--agent", "no_agent", "mcp_servers_config", "--mcp-servers-json", "--rpc",
        "--models-dir", "models_preset", "--host", "port", "--path", "log_file", "--api-key", "api_key_file",
        "--slot-save-path", "-hf", "hf", "hf_repo", "-mu", "model-url", "-dr", "hft", "grammar_file", "jf",
        "lookup_cache_dynamic", "media_path", "ssl_key_file", "ui_config_file", "log_prompts_dir", "video_ffmpeg_dir",
        "control_vector", "cors_origins", "log_disable", "log_jsonl", "v", "lv", "sleep_idle_seconds", "help",
        "version", "list_devices", "offline", "threads_http", "metrics", "props", "no_slots", "fit", "fitt", "webui",
        "sse_ping_interval", "to", "device", "devd", "gpt_oss_20b_default", "fim_qwen_7b_spec", "api_prefix",
    ],
)  # fmt: skip
def test_refused_flags(key: str) -> None:
    """Flags that read or write files, listen, connect, run tools or work against the daemon are refused everywhere."""
    assert why_denied(key, over_http=False)
    assert why_denied(key, over_http=True)
    with pytest.raises(ValueError, match="is not allowed: "):
        render_flag(key, True, known=KNOWN)


@pytest.mark.parametrize(
    "key",
    ["override_kv", "temp", "top_k", "rope_scaling", "yarn_orig_ctx", "numa", "cpu_mask", "poll", "prio",
     "spec_default", "chat_template_kwargs", "jinja", "no_warmup", "swa_full", "cache_reuse", "reasoning_budget",
     "no_host"],
)  # fmt: skip
def test_allowed_flags(key: str) -> None:
    """Tuning is allowed, over HTTP too."""
    assert why_denied(key, over_http=True) is None


@pytest.mark.parametrize(
    "key",
    ["--mcp-of-tomorrow", "no_mcp_of_tomorrow", "--ssl-ca-file", "models_x", "--some-model-url", "draft_grammar_file",
     "--llama-9-default", "--spec-other-hf", "log_everything"],
)  # fmt: skip
def test_families_are_refused_unlisted(key: str) -> None:
    """A newer build's member of a refused family is refused before anybody has listed it."""
    assert find_flag(key) is None
    assert why_denied(key, over_http=False)


def test_families_contradict_no_decision() -> None:
    """The family rules, applied to the listed flags, refuse only what the table refuses, but for what we decided."""
    decided_otherwise = {"--chat-template-file", "--spec-default"}
    caught = {
        flag.names[0]
        for flag in FLAGS
        if not flag.denied
        and (
            flag.names[0].startswith(tuple(prefix for prefix, _ in DENIED_PREFIXES))
            or flag.names[0].endswith(tuple(suffix for suffix, _ in DENIED_SUFFIXES))
        )
    }
    assert caught == decided_otherwise


def test_http_gives_only_listed_flags() -> None:
    """A flag that the table lacks is root's business."""
    assert why_denied("flag_of_tomorrow", over_http=False) is None
    assert why_denied("flag_of_tomorrow", over_http=True)


# Finding a flag


@pytest.mark.parametrize("key", ["n_gpu_layers", "n-gpu-layers", "--n-gpu-layers", "--n_gpu_layers", "ngl", "-ngl"])
def test_flag_is_found_by_each_spelling(key: str) -> None:
    """Dashes in front are optional and underscores are dashes."""
    found = find_flag(key)
    assert found is not None
    assert found.flag.field == "n_gpu_layers"
    assert not found.is_negated


@pytest.mark.parametrize("key", ["no_kv_offload", "--no-kv-offload", "nkvo", "-nkvo"])
def test_negated_flag_is_found(key: str) -> None:
    """The --no- spelling finds the flag and says that it is negated."""
    found = find_flag(key)
    assert found is not None
    assert found.flag.names[0] == "--kv-offload"
    assert found.is_negated


def test_case_of_short_flags_counts() -> None:
    """``-C`` is the CPU mask, ``-c`` the context."""
    upper, lower = find_flag("C"), find_flag("c")
    assert upper is not None
    assert lower is not None
    assert (upper.flag.names[0], lower.flag.names[0]) == ("--cpu-mask", "--ctx-size")


def test_bare_key_names_one_flag() -> None:
    """No bare key could mean one flag with one dash and another with two."""
    long = {name[2:]: flag for flag in FLAGS for name in (*flag.names, *flag.negated) if name.startswith("--")}
    short = {name[1:]: flag for flag in FLAGS for name in (*flag.names, *flag.negated) if not name.startswith("--")}
    assert [name for name in long.keys() & short.keys() if long[name] is not short[name]] == []


@pytest.mark.parametrize("key", ["", "-", "--", "---host", "--host=::", "top_k --host", "top_k\n", "-ot=x", "ö"])
def test_what_is_no_flag_is_not_found(key: str) -> None:
    """A key that could not be one argument names nothing, and cannot be rendered."""
    assert find_flag(key) is None
    with pytest.raises(ValueError, match=r"is no flag|is not allowed"):
        render_flag(key, True, known=ANY)


# Rendering


@pytest.mark.parametrize(
    ("key", "value", "arguments"),
    [
        # the traps of the command line
        ("flash_attn", True, ["--flash-attn", "on"]),
        ("flash_attn", False, ["--flash-attn", "off"]),
        ("fa", "auto", ["--flash-attn", "auto"]),
        ("tensor_split", [3, 1], ["--tensor-split", "3,1"]),
        ("tensor-split", "3,1", ["--tensor-split", "3,1"]),
        ("ngl", 99, ["--n-gpu-layers", "99"]),
        ("ngl", "all", ["--n-gpu-layers", "all"]),
        ("lazy_mode", True, ["--lazy-mode", "on"]),
        # switches
        ("swa_full", True, ["--swa-full"]),
        ("swa_full", False, []),
        ("warmup", False, ["--no-warmup"]),
        ("warmup", True, ["--warmup"]),
        ("no_warmup", True, ["--no-warmup"]),
        ("no_warmup", False, ["--warmup"]),
        ("-nkvo", True, ["--no-kv-offload"]),
        ("no_host", True, ["--no-host"]),
        ("no_host", False, []),
        ("no_mmproj", True, ["--no-mmproj"]),
        ("no_mmproj_auto", True, ["--no-mmproj"]),
        # nothing
        ("top_k", None, []),
        ("warmup", None, []),
        ("top_k", False, []),
        ("tags", [], []),
        # numbers and texts
        ("top_k", 40, ["--top-k", "40"]),
        ("top_k", "40", ["--top-k", "40"]),
        ("seed", -1, ["--seed", "-1"]),
        ("temp", 0.7, ["--temp", "0.7"]),
        ("min_p", 0.00001, ["--min-p", "1e-05"]),
        ("temperature", 1, ["--temp", "1"]),
        ("rope_scaling", "yarn", ["--rope-scaling", "yarn"]),
        ("reasoning_budget_message", "-- enough --", ["--reasoning-budget-message", "-- enough --"]),
        ("cpu_mask", 10, ["--cpu-mask", "10"]),
        # lists and JSON
        ("override_kv", ["a=int:1", "b=bool:false"], ["--override-kv", "a=int:1,b=bool:false"]),
        (
            "chat_template_kwargs",
            {"enable_thinking": False, "n": [1, 2]},
            ["--chat-template-kwargs", '{"enable_thinking":false,"n":[1,2]}'],
        ),
        ("chat_template_kwargs", '{"a": 1}', ["--chat-template-kwargs", '{"a": 1}']),
        ("json_schema", {"const": "a\nb, ü"}, ["--json-schema", '{"const":"a\\nb, ü"}']),
        ("json_schema", [1], ["--json-schema", "[1]"]),
    ],
)
def test_entry_becomes_arguments(key: str, value: object, arguments: list[str]) -> None:
    """One entry of extra_args is written as its flag's kind wants it, whether a binary was asked or not."""
    assert render_flag(key, value, known=KNOWN) == arguments
    assert render_flag(key, value, known=ANY) == arguments


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("swa_full", "yes", "--swa-full takes true or false, found 'yes'"),
        ("swa_full", 1, "--swa-full takes true or false, found 1"),
        ("no_warmup", "--host", "--no-warmup takes true or false"),
        ("flash_attn", 1, "--flash-attn takes on, off or auto, found 1"),
        ("flash_attn", "yes", "--flash-attn takes on, off or auto"),
        ("n_predict", "4k", "--n-predict takes a whole number, found '4k'"),
        ("n_predict", 4.5, "--n-predict takes a whole number"),
        ("n_predict", True, "--n-predict takes a whole number, found True"),
        ("n_predict", [1], "--n-predict takes a whole number"),
        ("n_predict", "\u0661", "--n-predict takes a whole number"),
        ("temp", "warm", "--temp takes a number, found 'warm'"),
        ("temp", float("nan"), "--temp takes a number"),
        ("rope_scaling", True, "--rope-scaling takes one text or number"),
        ("rope_scaling", ["yarn"], "--rope-scaling takes one text or number"),
        ("rope_scaling", {"a": 1}, "--rope-scaling takes one text or number"),
        ("rope_scaling", "ya\nrn", "line break or NUL"),
        ("rope_scaling", "ya\0rn", "line break or NUL"),
        ("rope_scaling", "\ud800", "not valid text"),
        ("override_kv", ["a=str:x,y"], "separates its values by commas"),
        ("override_kv", [True], "--override-kv takes one text or number"),
        ("override_kv", [["a"]], "--override-kv takes one text or number"),
        ("chat_template_kwargs", 5, "--chat-template-kwargs takes an object, found 5"),
        ("chat_template_kwargs", {"a": float("inf")}, "--chat-template-kwargs takes JSON"),
        ("chat_template_kwargs", {"a": datetime.date(2026, 1, 1)}, "--chat-template-kwargs takes JSON"),
        ("host", "0.0.0.0", "host is not allowed: it opens a listening socket"),
        ("tools", None, "tools is not allowed: it runs tools"),
    ],
)
def test_unsuitable_value_is_a_fault(key: str, value: object, message: str) -> None:
    """A value that the flag cannot take is named together with what was expected."""
    with pytest.raises(ValueError, match=message):
        render_flag(key, value, known=KNOWN)


def test_spelling_that_the_binary_knows_is_chosen() -> None:
    """An older binary gets the spelling that it has."""
    assert render_flag("spec_draft_model", "d.gguf", known=frozenset({"-md", "--model-draft"})) == ["-md", "d.gguf"]


def test_flag_that_the_binary_lacks_is_a_fault() -> None:
    """A listed flag that this binary does not accept is told before anything starts."""
    with pytest.raises(ValueError, match="does not accept --moe-cache-mib"):
        render_flag("moe_cache_mib", 512, known=frozenset({"--n-cpu-moe"}))


def test_switch_that_cannot_be_switched_off_is_a_fault() -> None:
    """Saying nothing would leave it on."""
    with pytest.raises(ValueError, match="does not accept --no-warmup"):
        render_flag("warmup", False, known=frozenset({"--warmup"}))


@pytest.mark.parametrize(
    ("key", "value", "arguments"),
    [
        ("new_switch", True, ["--new-switch"]),
        ("new_switch", False, ["--no-new-switch"]),
        ("no_new_switch", True, ["--no-new-switch"]),
        ("no_new_switch", False, ["--new-switch"]),
        ("new_value", 3, ["--new-value", "3"]),
        ("new_value", "-3", ["--new-value", "-3"]),
        ("--new-value", ["a", "b"], ["--new-value", "a,b"]),
        ("new_value", {"a": 1}, ["--new-value", '{"a":1}']),
        ("new_value", None, []),
        ("new_value", False, []),
        ("new_value", [], []),
    ],
)
def test_flag_of_a_newer_build(key: str, value: object, arguments: list[str]) -> None:
    """An unlisted flag is written by its value's type; a --no- twin in the binary shows that it is a switch."""
    known = KNOWN | {"--new-switch", "--no-new-switch", "--new-value"}
    assert render_flag(key, value, known=known) == arguments


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("new_switch", "on", "--new-switch takes true or false"),
        ("new_value", "--host", "may not begin with '-'"),
        ("-nv", 1, "write its long name"),
        ("n_gpu_layer", 1, "does not accept --n-gpu-layer; did you mean .*--n-gpu-layers"),
        ("mcp_of_tomorrow", True, "is not allowed: it runs tools"),
    ],
)
def test_fault_with_a_flag_of_a_newer_build(key: str, value: object, message: str) -> None:
    """An unlisted flag must be accepted by the binary, and its value must not be able to become another flag."""
    known = KNOWN | {"--new-switch", "--no-new-switch", "--new-value", "-nv", "--mcp-of-tomorrow"}
    with pytest.raises(ValueError, match=message):
        render_flag(key, value, known=known)


def test_unknown_flag_passes_when_no_binary_was_asked() -> None:
    """Without a binary there is nothing to check against; starting it will tell."""
    assert render_flag("flag_of_tomorrow", 1, known=ANY) == ["--flag-of-tomorrow", "1"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(KNOWN)) | st.text(max_size=12) | st.just("flag-of-tomorrow")


@given(key=KEYS, value=JSON_VALUES)
def test_any_entry_is_rendered_or_a_fault(key: str, value: object) -> None:
    """Whatever a recipe holds, the result is at most an allowed flag and one clean argument, or a ValueError."""
    try:
        arguments = render_flag(key, value, known=KNOWN)
    except ValueError:
        return
    assert len(arguments) <= 2
    for name in arguments[:1]:
        assert name in KNOWN
        assert why_denied(name, over_http=True) is None
    for argument in arguments:
        assert argument.encode().count(b"\n") == 0


# Old spellings


def test_successors_are_listed() -> None:
    """What a dropped flag is replaced by is a flag of the table; what has no successor says what to do."""
    for old, renamed in RENAMED.items():
        if renamed.flag is None:
            assert renamed.hint, old
        else:
            found = find_flag(renamed.flag)
            assert found is not None
            assert found.flag.names[0] == renamed.flag
            assert not found.flag.denied


def test_removed_flags_of_the_help_have_an_answer() -> None:
    """Each stub that the help marks as removed has an entry."""
    assert {name for entry in parse_help(HELP) if entry.is_removed for name in entry.names} <= RENAMED.keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"mmap": False}, {"--load-mode": "none"}),
        ({"mmap": True}, {"--load-mode": "mmap"}),
        ({"no_mmap": True}, {"--load-mode": "none"}),
        ({"--no-mmap": True}, {"--load-mode": "none"}),
        ({"no_mmap": False}, {}),
        ({"mlock": True}, {"--load-mode": "mlock"}),
        ({"mlock": False}, {}),
        ({"mlock": True, "no_mmap": True}, {"--load-mode": "mlock"}),
        ({"mlock": True, "mmap": True}, {"--load-mode": "mmap+mlock"}),
        ({"mmap": True, "--mmap": True}, {"--load-mode": "mmap"}),
        ({"dio": True, "no_mmap": True}, {"--load-mode": "dio"}),
        ({"draft_max": 8, "draft_min": 2}, {"--spec-draft-n-max": 8, "--spec-draft-n-min": 2}),
        ({"draft_max": None}, {"draft_max": None}),
        ({"top_k": 40, "kv_unified": True}, {"top_k": 40, "kv_unified": True}),
    ],
)
def test_old_spelling_keeps_working(old: dict[str, object], new: dict[str, object]) -> None:
    """Flags that were dropped are translated, and the result is accepted by the binary."""
    modern = modernize(old, known=KNOWN)
    assert modern.extra_args == new
    for key, value in modern.extra_args.items():
        if value is not None:
            assert render_flag(key, value, known=KNOWN)


def test_translation_is_told() -> None:
    """Each translation comes with a sentence for the recipe's author."""
    notes = modernize({"mlock": True, "no_mmap": True, "draft_max": 8}, known=KNOWN).notes
    assert notes == (
        "--mlock and --no-mmap were replaced by --load-mode: given as mlock",
        "--draft-max was replaced by --spec-draft-n-max: given as 8 (n-gram drafts use --spec-ngram-mod-n-max)",
    )


def test_old_binary_keeps_old_spelling() -> None:
    """A binary without the new flag gets the old one."""
    known = frozenset({"--mmap", "--no-mmap", "--mlock", "--top-k"})
    modern = modernize({"mmap": False, "mlock": True}, known=known)
    assert modern.extra_args == {"mmap": False, "mlock": True}
    assert modern.notes == ()
    assert render_flag("mmap", False, known=known) == ["--no-mmap"]


def test_binary_with_both_gets_the_new_spelling() -> None:
    """Where both are accepted they are still one setting."""
    modern = modernize({"no_mmap": True}, known=KNOWN | {"--mmap", "--no-mmap"})
    assert modern.extra_args == {"--load-mode": "none"}


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"mmap": True, "no_mmap": True}, "--mmap and --no-mmap contradict each other: give --load-mode"),
        ({"mmap": True, "dio": True}, "contradict each other"),
        ({"draft": 4, "draft_max": 8}, "--draft and --draft-max contradict each other: give --spec-draft-n-max"),
        ({"mlock": True, "load_mode": "mmap"}, "load_mode and --mlock set the same thing: keep load_mode"),
        ({"mlock": "yes"}, "--mlock takes true or false, found 'yes'"),
        ({"spec_ngram_size_n": 12}, "--spec-ngram-size-n was removed from llama-server: give it for one kind"),
        ({"cd": 4096}, "-cd was removed from llama-server: the draft model's context follows max_model_len"),
    ],
)
def test_old_spelling_without_one_meaning_is_a_fault(old: dict[str, object], message: str) -> None:
    """Contradictions and flags without a single successor are told, not guessed."""
    with pytest.raises(ValueError, match=message):
        modernize(old, known=KNOWN)
