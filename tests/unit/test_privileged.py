"""What the launcher starts, writes and refuses, without systemd: recipes, trust in files, strict set, socket."""

import contextlib
import errno
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmstudiod.adapters.recipe_files import load_recipe_file
from llmstudiod.core import strict
from llmstudiod.core.bound_file import model_files
from llmstudiod.core.command import BoundFile
from llmstudiod.core.errors import AccessDeniedError, ConfigError, LoadFailedError
from llmstudiod.core.launcher_protocol import Act, Launch, Request, Verb, write_request
from llmstudiod.core.recipe import Recipe, recipe_hash
from llmstudiod.demo.tiny_gguf import TinyModel, write_tiny_gguf
from llmstudiod.privileged.__main__ import serve
from llmstudiod.privileged.files import checked
from llmstudiod.privileged.store import Store
from llmstudiod.privileged.trusted import read_trusted, write_trusted
from llmstudiod.privileged.units import Units

ME = os.getuid()


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """A directory like /etc/llmstudio, with a recipe, and one with a model."""
    etc = tmp_path / "etc"
    (etc / "recipes.d").mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "state").mkdir(mode=0o700)
    for directory in (tmp_path, etc, etc / "recipes.d", tmp_path / "models"):
        directory.chmod(0o755)
    write_tiny_gguf(tmp_path / "models" / "tiny.gguf", TinyModel(n_layers=1))
    (tmp_path / "models" / "tiny.gguf").chmod(0o644)
    config = f"recipes_dir: {etc}/recipes.d\nmodel_dirs: [{tmp_path}/models]\nkeys_file: {etc}/keys\n"
    (etc / "llmstudiod.yaml").write_text(config)
    put(etc, "m.yaml", f"id: m\nmodel_path: {tmp_path}/models/tiny.gguf\n")
    return etc


def put(etc: Path, name: str, text: str, mode: int = 0o644) -> Path:
    """Write a recipe file."""
    path = etc / "recipes.d" / name
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def store(etc: Path) -> Store:
    """The launcher's knowledge of that directory."""
    return Store(str(etc / "llmstudiod.yaml"), etc.parent / "state", owner=ME)


def launch_of(path: Path, **changes: Any) -> Launch:
    """What the daemon asks for the recipe of a file."""
    (entry,) = load_recipe_file(path).entries
    recipe = entry.recipe
    fields = {"id": recipe.id, "hash": recipe_hash(recipe), "file": str(path), "model": recipe.model_path, **changes}
    return Launch(Verb.START, **fields)


def recipe_of(store: Store, launch: Launch) -> Recipe:
    """Return what would be started."""
    return store.recipe(launch, store.settings())


# Recipes


def test_recipe_is_read_by_the_launcher_itself(store: Store, etc: Path) -> None:
    """What it starts is what root's file says."""
    launch = launch_of(etc / "recipes.d" / "m.yaml")
    assert recipe_of(store, launch).model_path == launch.model


def test_half_edited_file_changes_nothing_that_runs(store: Store, etc: Path) -> None:
    """The last good copy is started for as long as the daemon asks for it; a good change is started when it asks."""
    path = etc / "recipes.d" / "m.yaml"
    launch = launch_of(path)
    known = recipe_of(store, launch)
    path.write_text("id: m\nmodel_pa")
    assert recipe_of(store, launch) == known
    path.write_text(f"id: m\nmodel_path: {launch.model}\nmax_num_seqs: 2\n")
    assert recipe_of(store, launch) == known
    assert recipe_of(store, launch_of(path)).max_num_seqs == 2
    with pytest.raises(ConfigError, match="has changed since the daemon read it"):
        recipe_of(store, launch)


def test_relaxation_that_was_taken_back_is_over(store: Store, etc: Path) -> None:
    """A copy holds what only a person may give no longer than the file does; a file being edited takes nothing back."""
    path = put(etc, "r.yaml", f"id: r\nmodel_path: {etc.parent}/models/tiny.gguf\nsandbox: {{network: host}}\n")
    launch = launch_of(path)
    known = recipe_of(store, launch)
    path.write_text("id: r\nsandbox: {netw")
    assert recipe_of(store, launch) == known
    path.write_text(f"id: r\nmodel_path: {etc.parent}/models/tiny.gguf\n")
    with pytest.raises(ConfigError, match="has changed since the daemon read it"):
        recipe_of(store, launch)


def test_copy_is_worth_no_more_than_its_file(store: Store, etc: Path) -> None:
    """A file that others may write by now is refused, though it was good when it was copied."""
    path = etc / "recipes.d" / "m.yaml"
    launch = launch_of(path)
    recipe_of(store, launch)
    path.chmod(0o666)
    with pytest.raises(AccessDeniedError, match="expected nobody but root to write it"):
        recipe_of(store, launch)


def test_copy_of_a_removed_recipe_is_not_started(store: Store, etc: Path) -> None:
    """Removing the file takes it away from everybody."""
    path = etc / "recipes.d" / "m.yaml"
    launch = launch_of(path)
    recipe_of(store, launch)
    path.unlink()
    with pytest.raises(ConfigError, match="any more, so its recipe is not started"):
        recipe_of(store, launch)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"hash": 1}'])
def test_damaged_copy_is_made_again(store: Store, etc: Path, damage: str) -> None:
    """The state directory may be lost; it costs the time to read the file."""
    launch = launch_of(etc / "recipes.d" / "m.yaml")
    recipe_of(store, launch)
    (etc.parent / "state" / "recipes" / "m.json").write_text(damage)
    assert recipe_of(store, launch).id == "m"


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_recipe_that_others_may_write_is_refused(store: Store, etc: Path, mode: int) -> None:
    """Whoever may write it could have written it."""
    path = put(etc, "w.yaml", "id: w\nmodel_path: /m.gguf\n", mode)
    with pytest.raises(AccessDeniedError, match=f"expected nobody but root to write it, found mode {mode:04o}"):
        recipe_of(store, launch_of(path))


def test_recipe_in_a_directory_that_others_may_write_is_refused(store: Store, etc: Path) -> None:
    """They could have put it there."""
    launch = launch_of(etc / "recipes.d" / "m.yaml")
    (etc / "recipes.d").chmod(0o777)
    with pytest.raises(AccessDeniedError, match="expected nobody but root to write it, found mode 0777"):
        recipe_of(store, launch)


@pytest.mark.skipif(ME != 0, reason="only root can give files away")
def test_recipe_of_somebody_else_is_refused(store: Store, etc: Path) -> None:
    """By the file's owner, whatever its mode."""
    path = put(etc, "x.yaml", "id: x\nmodel_path: /m.gguf\n")
    os.chown(path, 12345, 12345)
    with pytest.raises(AccessDeniedError, match="expected root to own it, found uid 12345"):
        recipe_of(store, launch_of(path))


def test_link_in_the_place_of_a_recipe_is_refused(store: Store, etc: Path) -> None:
    """Also a link on the way to it."""
    outside = etc.parent / "outside.yaml"
    outside.write_text("id: l\nmodel_path: /m.gguf\n")
    link = etc / "recipes.d" / "l.yaml"
    link.symlink_to(outside)
    with pytest.raises(AccessDeniedError, match=r"expected no symbolic link on the way, found 'l\.yaml'"):
        recipe_of(store, launch_of(link))
    (etc.parent / "etc2").symlink_to(etc)
    with pytest.raises(AccessDeniedError, match="expected no symbolic link on the way, found 'etc2'"):
        read_trusted(str(etc.parent / "etc2" / "llmstudiod.yaml"), owner=ME)


def test_file_elsewhere_is_no_recipe(store: Store, etc: Path) -> None:
    """The recipes directory is the only one."""
    path = etc / "other.yaml"
    path.write_text("id: o\nmodel_path: /m.gguf\n")
    with pytest.raises(AccessDeniedError, match="does not lie in the recipes directory"):
        recipe_of(store, launch_of(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("id: b\nmodel_path: /m.gguf\nenv_vars: {LD_PRELOAD: /x.so}\n", "no recipe may set LD_PRELOAD"),
        ("id: b\nmodel_path: /m.gguf\nextra_args: {tools: all}\n", "the flag --tools is not allowed"),
        ("id: b\nmodel_path: /m.gguf\nextra_args: {log_file: /etc/x}\n", "the flag --log-file is not allowed"),
        ("id: b\nmodel_path: /m.gguf\nextra_args: {rpc: 'a:1'}\n", "the flag --rpc is not allowed"),
        ("id: b\nmodel_path: /m.gguf\nextra_args: {models_dir: /x}\n", "the flag --models-dir is not allowed"),
        ("id: b\nmodel_path: /m.gguf\nllama_server_path: /bin/sh\n", "expected no name of a binary"),
        ("id: ../b\nmodel_path: /m.gguf\n", "expected an id"),
        ("id: b\n", "model_path"),
        ("a: [", "not valid YAML"),
    ],
)
def test_launcher_judges_recipes_by_itself(store: Store, etc: Path, text: str, says: str) -> None:
    """Whatever the daemon says of it, a faulty recipe is not started."""
    path = put(etc, "b.yaml", text)
    with pytest.raises(ConfigError) as caught:
        recipe_of(store, Launch(Verb.START, "b", "sha256:" + "0" * 64, str(path), "/m.gguf"))
    assert says in caught.value.message


# Models without a recipe


def without_recipe(path: Path, model_id: str) -> Launch:
    """What the daemon asks for a GGUF that it found."""
    recipe = Recipe(id=model_id, model_path=str(path))
    return Launch(Verb.START, model_id, recipe_hash(recipe), None, str(path))


def test_model_without_a_recipe_must_lie_in_the_model_directories(store: Store, etc: Path) -> None:
    """Links followed; its id is the one that its name gives."""
    models = etc.parent / "models"
    assert recipe_of(store, without_recipe(models / "tiny.gguf", "tiny")).id == "tiny"
    secret = etc.parent / "secret.gguf"
    secret.write_bytes(b"GGUF")
    (models / "link.gguf").symlink_to(secret)
    for launch in (without_recipe(secret, "secret"), without_recipe(models / "link.gguf", "link")):
        with pytest.raises(AccessDeniedError, match="expected a file in the model directories"):
            recipe_of(store, launch)
    with pytest.raises(AccessDeniedError, match="is not served without a recipe as 'other'"):
        recipe_of(store, without_recipe(models / "tiny.gguf", "other"))


def test_auto_recipes_may_be_off(store: Store, etc: Path) -> None:
    """Then nothing is started without a recipe."""
    with (etc / "llmstudiod.yaml").open("a") as config:
        config.write("auto_recipes: false\n")
    with pytest.raises(AccessDeniedError, match="is not served without a recipe"):
        recipe_of(store, without_recipe(etc.parent / "models" / "tiny.gguf", "tiny"))


# Files of a model


@pytest.mark.parametrize(
    ("content", "mode", "is_text", "says"),
    [
        (b"root:x:0:0", 0o644, False, "expected a GGUF file, found another"),
        (b"", 0o644, False, "expected a GGUF file, found another"),
        (b"root:x:0:0", 0o640, False, "expected a GGUF file, found another"),  # and no advice to open it
        (b"GGUF", 0o640, False, "has mode 0640: the model's own user may not read it"),
        (b"a\0b", 0o644, True, "expected a text of at most 1 MiB"),
        (b"x" * ((1 << 20) + 1), 0o644, True, "expected a text of at most 1 MiB"),
    ],
)
def test_only_models_and_templates_are_bound(
    tmp_path: Path, content: bytes, mode: int, is_text: bool, says: str
) -> None:
    """What a recipe names is looked into, behind every link."""
    target = tmp_path / "target"
    target.write_bytes(content)
    target.chmod(mode)
    link = tmp_path / "m.gguf"
    link.symlink_to(target)
    with pytest.raises(LoadFailedError) as caught:
        checked([BoundFile(str(link), "/run/x")], str(link) if is_text else None, [])
    assert says in caught.value.message


@pytest.mark.parametrize("path", ["/etc/shadow", "/dev/zero", "/proc/self/environ", "/nowhere"])
def test_file_that_is_no_model_is_not_bound(tmp_path: Path, path: str) -> None:
    """Nor is a device, a pseudo-file or nothing at all."""
    link = tmp_path / "m.gguf"
    link.symlink_to(path)
    with pytest.raises(LoadFailedError):
        checked([BoundFile(str(link), "/run/x")], None, [])


@pytest.mark.parametrize("name", ["a\nb.gguf", "a\tb.gguf", 'a"b.gguf'])
def test_path_that_systemd_would_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    """It takes a line break for the letter n: another file than the one that was looked into would be bound."""
    target = tmp_path / name
    target.write_bytes(b"GGUF")
    link = tmp_path / "m.gguf"
    link.symlink_to(target)
    with pytest.raises(LoadFailedError, match="in its path"):
        checked([BoundFile(str(link), "/run/x")], None, [])


@pytest.mark.skipif(ME != 0, reason="only root can give files away")
@pytest.mark.parametrize("way", ["a link", "a directory's link", "root's link to it", "relative"])
def test_link_of_another_leads_to_their_own_files_alone(tmp_path: Path, way: str) -> None:
    """Whoever may write a directory of models cannot have others' files shown; their cache's links are fine."""
    home, models = tmp_path / "home", tmp_path / "models"
    home.mkdir()
    models.mkdir()
    target = home / "m.gguf"
    target.write_bytes(b"GGUF")
    link = models / "m.gguf"
    if way == "a directory's link":
        (models / "d").symlink_to(home)
        os.lchown(models / "d", 12345, 12345)
        link = models / "d" / "m.gguf"
    else:
        link.symlink_to("../home/m.gguf" if way == "relative" else target)
        os.lchown(link, 12345, 12345)
    if way == "root's link to it":
        (tmp_path / "x.gguf").symlink_to(link)
        link = tmp_path / "x.gguf"
    with pytest.raises(AccessDeniedError, match="by a link of uid 12345"):
        checked([BoundFile(str(link), "/run/x")], None, [str(models)])
    bound = (BoundFile(str(target), "/run/x"),)
    assert checked([BoundFile(str(link), "/run/x")], None, [str(models), str(home)]) == bound
    os.chown(target, 12345, 12345)
    assert checked([BoundFile(str(link), "/run/x")], None, [str(models)]) == bound


def test_circle_of_links_is_refused(tmp_path: Path) -> None:
    """As the kernel would."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(LoadFailedError, match="too many links"):
        checked([BoundFile(str(tmp_path / "a"), "/run/x")], None, [])


def test_real_place_is_bound(tmp_path: Path) -> None:
    """The link may be changed later; what was looked into is what the model gets."""
    target = tmp_path / "blob"
    target.write_bytes(b"GGUF")
    link = tmp_path / "m.gguf"
    link.symlink_to(target)
    assert checked([BoundFile(str(link), "/run/x/m.gguf")], None, []) == (BoundFile(str(target), "/run/x/m.gguf"),)


def test_directory_of_a_recipe_is_where_its_model_lies(etc: Path) -> None:
    """The daemon says which file of it, and no other one."""
    models = etc.parent / "models"
    recipe = Recipe(id="m", model_path=str(models))
    launch = Launch(Verb.START, "m", recipe_hash(recipe), "/x.yaml", str(models / "tiny.gguf"))
    assert model_files(recipe, launch, (), os.path).model == (str(models / "tiny.gguf"),)
    other = Launch(Verb.START, "m", recipe_hash(recipe), "/x.yaml", "/srv/other.gguf")
    with pytest.raises(AccessDeniedError, match="does not lie in"):
        model_files(recipe, other, (), os.path)


def test_relative_paths_and_shards_are_found(etc: Path) -> None:
    """As the daemon finds them."""
    models = etc.parent / "models"
    recipe = Recipe(id="m", model_path="big-00001-of-00002.gguf", mmproj="tiny.gguf")
    launch = Launch(Verb.START, "m", recipe_hash(recipe), "/x.yaml", "/ignored.gguf", n_ctx_train=7)
    (models / "big-00001-of-00002.gguf").write_bytes(b"GGUF")
    found = model_files(recipe, launch, ("/nowhere", str(models)), os.path)
    assert found.model == tuple(str(models / f"big-0000{n}-of-00002.gguf") for n in (1, 2))
    assert (found.mmproj, found.n_ctx_train) == (str(models / "tiny.gguf"), 7)


# A full disk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel tells it, when a file is to be written out."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.usefixtures("full_disk")
def test_full_disk_stops_no_start(store: Store, etc: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What is kept can be found out again: it is kept in memory, and told; nothing half-written is left."""
    launch = launch_of(etc / "recipes.d" / "m.yaml")
    assert recipe_of(store, launch).id == "m"
    store.keep("binary.json", {"identity": [1]})
    assert store.kept("binary.json") == {"identity": [1]}
    assert "binary.json': No space left on device" in capfd.readouterr().err
    (etc / "recipes.d" / "m.yaml").write_text("id: m\nmodel_pa")
    assert recipe_of(store, launch).id == "m"
    assert [path for path in (etc.parent / "state").rglob("*") if path.is_file()] == []


def test_copies_are_written_when_there_is_room_again(
    store: Store, etc: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file counts again then."""
    request.getfixturevalue("full_disk")
    store.keep("binary.json", {"identity": [1]})
    monkeypatch.undo()
    store.keep("binary.json", {"identity": [2]})
    assert Store("", etc.parent / "state", owner=ME).kept("binary.json") == {"identity": [2]}
    assert store.kept("binary.json") == {"identity": [2]}


def test_full_disk_takes_no_recipe_over_http(store: Store, etc: Path, request: pytest.FixtureRequest) -> None:
    """It could not be told from one that a person wrote; nothing is changed, and the hint says what to do."""
    settings = store.settings()
    request.getfixturevalue("full_disk")
    with pytest.raises(ConfigError, match="No space left on device") as caught:
        store.put_recipe("new.yaml", good(etc), settings)
    assert caught.value.hint == "make room on its disk"
    assert not (etc / "recipes.d" / "new.yaml").exists()


# Writing


def good(etc: Path) -> str:
    """A recipe that may come over HTTP."""
    return f"id: new\nmodel_path: {etc.parent}/models/tiny.gguf\nextra_args: {{top_k: 40}}\n"


def test_recipe_over_http_is_written(store: Store, etc: Path) -> None:
    """As root's file, as a whole; and it can be replaced and removed again."""
    store.put_recipe("new.yaml", good(etc), store.settings())
    path = etc / "recipes.d" / "new.yaml"
    assert path.read_text() == good(etc)
    assert path.stat().st_mode & 0o777 == 0o644
    store.put_recipe("new.yaml", good(etc) + "# again\n", store.settings())
    store.delete_recipe("new.yaml", store.settings())
    assert list(path.parent.iterdir()) == [path.parent / "m.yaml"]


def test_what_was_noted_of_removed_recipes_is_forgotten(store: Store, etc: Path) -> None:
    """With the next one that is written: it does not grow for ever. What is there still is ours."""
    store.put_recipe("stays.yaml", good(etc).replace("id: new", "id: stays"), store.settings())
    for name in ("over-http.yaml", "by-hand.yaml"):
        store.put_recipe(name, good(etc), store.settings())
        if name == "by-hand.yaml":
            (etc / "recipes.d" / name).unlink()
        else:
            store.delete_recipe(name, store.settings())
    store.put_recipe("new.yaml", good(etc), store.settings())
    assert sorted(store.kept("written.json") or {}) == ["new.yaml", "stays.yaml"]
    store.delete_recipe("stays.yaml", store.settings())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sandbox: {network: host}", "expected no relaxation over HTTP, found network: host"),
        ("env_vars: {GGML_X: '1'}", "expected no environment variables over HTTP, found GGML_X"),
        ("extra_args: {flag_of_tomorrow: 1}", "only flags that llmstudiod knows may be given over HTTP"),
        ("extra_args: {tools: all}", "the flag --tools is not allowed"),
        ("mmproj: /etc/passwd", "expected a file in the model directories"),
        ("chat_template_file: /etc/passwd", "expected a file in the model directories"),
        ("lora: ../../../etc/passwd", "expected a file in the model directories"),
        ("max_num_seqs: many", "expected a whole number"),
    ],
)
def test_strict_set_for_what_comes_over_http(store: Store, etc: Path, line: str, says: str) -> None:
    """Nothing that only a person may give, whatever the daemon has checked."""
    with pytest.raises(AccessDeniedError) as caught:
        store.put_recipe("new.yaml", good(etc).replace("extra_args: {top_k: 40}", "") + line, store.settings())
    assert says in caught.value.message
    assert not (etc / "recipes.d" / "new.yaml").exists()


@pytest.mark.parametrize("text", ["", "[]", "a: [", "- 5"])
def test_nothing_is_no_recipe(store: Store, etc: Path, text: str) -> None:
    """Nor is what cannot be read."""
    with pytest.raises(AccessDeniedError, match="cannot be written"):
        store.put_recipe("new.yaml", text, store.settings())
    assert not (etc / "recipes.d" / "new.yaml").exists()


@pytest.mark.parametrize("more", ["", "sandbox: {network: host}\n", "max_num_seqs: many\n", "a: [", "- 5"])
def test_recipe_written_by_hand_cannot_be_replaced(store: Store, etc: Path, more: str) -> None:
    """Whatever it holds, good or faulty: what a person wrote has comments, and reasons. Nor is it removed."""
    path = put(etc, "new.yaml", good(etc) + more)
    before = path.read_text()
    with pytest.raises(AccessDeniedError, match="written by hand"):
        store.put_recipe("new.yaml", good(etc), store.settings())
    with pytest.raises(AccessDeniedError, match="written by hand"):
        store.delete_recipe("new.yaml", store.settings())
    assert path.read_text() == before


@pytest.mark.parametrize("is_written", [False, True], ids=["before", "after"])
def test_crash_while_a_recipe_is_written(
    store: Store, etc: Path, monkeypatch: pytest.MonkeyPatch, *, is_written: bool
) -> None:
    """Whether it comes before or after the file itself is there, the file that it leaves is still ours."""

    def crash(path: str, text: str, **options: Any) -> None:
        if is_written or not path.endswith("new.yaml"):
            write_trusted(path, text, **options)
        if path.endswith("new.yaml"):
            raise KeyboardInterrupt

    for text in (good(etc), good(etc) + "max_num_seqs: 2\n", good(etc) + "max_num_seqs: 3\n"):
        with monkeypatch.context() as patch:
            patch.setattr("llmstudiod.privileged.store.write_trusted", crash)
            with pytest.raises(KeyboardInterrupt):
                store.put_recipe("new.yaml", text, store.settings())
        store.put_recipe("new.yaml", text, store.settings())
    store.delete_recipe("new.yaml", store.settings())
    assert not (etc / "recipes.d" / "new.yaml").exists()


def test_recipe_that_a_person_edited_is_theirs(store: Store, etc: Path) -> None:
    """Also when it came over HTTP once."""
    store.put_recipe("new.yaml", good(etc), store.settings())
    with (etc / "recipes.d" / "new.yaml").open("a") as file:
        file.write("# mine now\n")
    with pytest.raises(AccessDeniedError, match="written by hand"):
        store.put_recipe("new.yaml", good(etc), store.settings())


def test_what_an_earlier_version_noted_counts(store: Store, etc: Path) -> None:
    """It noted one text for each file; a crash while the next one is written leaves that or the noted one."""
    path = put(etc, "new.yaml", good(etc))
    store.keep("written.json", {"new.yaml": strict.digest(path.read_bytes())})
    store.put_recipe("new.yaml", good(etc) + "# again\n", store.settings())
    path.write_text(good(etc))
    store.delete_recipe("new.yaml", store.settings())


async def test_whose_file_it_is_can_be_asked(store: Store, etc: Path) -> None:
    """By writing nothing into it, which changes nothing."""

    async def write(name: str, text: str) -> None:
        store.put_recipe(name, text, store.settings())

    store.put_recipe("new.yaml", good(etc), store.settings())
    path = put(etc, "hand.yaml", good(etc))
    asked = {name: await strict.refuses_as_foreign(write, name) for name in ("new.yaml", "hand.yaml", "none.yaml")}
    assert asked == {"new.yaml": False, "hand.yaml": True, "none.yaml": False}
    assert path.read_text() == path.with_name("new.yaml").read_text() == good(etc)
    assert not path.with_name("none.yaml").exists()


@pytest.mark.parametrize("line", ["id: m", "id: other\naliases: [m]", "id: other\nserved_model_name: broken"])
def test_recipe_over_http_takes_no_name_of_another(store: Store, etc: Path, line: str) -> None:
    """It would displace it, or be displaced; faulty recipes keep their names."""
    put(etc, "broken.yaml", "id: broken\nmodel_path: /m.gguf\nthreads: many\n")
    with pytest.raises(AccessDeniedError, match="expected a name that is free, found"):
        store.put_recipe("0.yaml", good(etc).replace("id: new", line), store.settings())


def test_threads_do_not_disturb_each_other(store: Store, etc: Path) -> None:
    """Each request has a thread of its own, and the first ones after an installation all write the same copies."""
    whole: list[int] = []

    def work() -> None:
        for _ in range(50):
            store.keep("settings.json", {"files": ["x" * 10_000]})
            whole.append(store.kept("settings.json") == {"files": ["x" * 10_000]})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole == [True] * 200
    assert [path.name for path in (etc.parent / "state").iterdir()] == ["settings.json"]


def test_keys_are_for_root_and_the_daemon(store: Store, etc: Path) -> None:
    """Not for everybody who has an account."""
    store.put_keys("[]", store.settings())
    assert (etc / "keys").stat().st_mode & 0o777 == 0o640


def test_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is replaced as a whole or not at all."""
    path = tmp_path / "f"
    write_trusted(str(path), "old", owner=ME)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space"):
        write_trusted(str(path), "new", owner=ME)
    assert path.read_text() == "old"


# The socket


class Recorder(Units):
    """Carries nothing out."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def perform(self, request: Request) -> dict[str, Any]:
        """Write down, or fail as told."""
        self.asked.append(request)
        if isinstance(request, Act) and request.id == "bug":
            raise RuntimeError("a bug")
        if isinstance(request, Act) and request.id == "no":
            raise ConfigError("no", hint="ask another", details={"a": 1})
        return {"ok": True}


@pytest.fixture
def units() -> Recorder:
    """The verbs, only written down."""
    return Recorder()


def served(tmp_path: Path, units: Units, uids: frozenset[int]) -> Iterator[Path]:
    """Serve a socket until nothing was asked for half a second."""
    path = tmp_path / "launcher.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener, units), kwargs={"uids": uids, "idle_s": 0.5})
        thread.start()
        yield path
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def address(tmp_path: Path, units: Recorder) -> Iterator[Path]:
    """The socket, for us."""
    yield from served(tmp_path, units, frozenset({ME}))


@pytest.fixture
def closed_address(tmp_path: Path, units: Recorder) -> Iterator[Path]:
    """The socket, for somebody else."""
    yield from served(tmp_path, units, frozenset({ME + 1}))


def ask(address: Path, line: bytes) -> dict[str, Any]:
    """Send bytes, and return the answer."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(address))
        with contextlib.suppress(OSError):  # whoever is refused for who he is gets his answer before he has asked
            client.sendall(line)
            client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as stream:
            answer: dict[str, Any] = json.loads(stream.readline())
    return answer


def test_each_request_is_answered(address: Path, units: Recorder) -> None:
    """In one line; a refusal carries kind, message, hint and details, a bug only that there was one."""
    assert ask(address, write_request(Act(Verb.STOP, "m"))) == {"ok": True}
    assert ask(address, write_request(Act(Verb.STOP, "no"))) == {
        "error": {"kind": "config", "message": "no", "hint": "ask another", "details": {"a": 1}}
    }
    assert ask(address, write_request(Act(Verb.STOP, "bug")))["error"]["message"] == "llmstudio-launcher failed: a bug"
    assert [request.id for request in units.asked if isinstance(request, Act)] == ["m", "no", "bug"]


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"\n", b'{"verb":"stop","id":"m"}', b'{"verb":"probe"}\n{"verb":"probe"}\n']
)
def test_what_is_no_line_is_refused(address: Path, units: Recorder, line: bytes) -> None:
    """One line, with its end, and nothing behind it."""
    assert ask(address, line)["error"]["kind"] == "bad_request"
    assert units.asked == []


def test_other_user_is_refused(closed_address: Path, units: Recorder) -> None:
    """The kernel says who connects."""
    told = ask(closed_address, write_request(Act(Verb.PROBE)))["error"]
    assert told["message"] == f"uid {ME} may not ask llmstudio-launcher for anything"
    assert units.asked == []


def test_request_that_is_too_long_is_refused(address: Path, units: Recorder) -> None:
    """Without being kept."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(address))
        try:
            for _ in range(30):
                client.sendall(b"x" * (1 << 16))
        except BrokenPipeError:
            pass
        with client.makefile("rb") as stream:
            assert json.loads(stream.readline())["error"]["kind"] == "bad_request"
    assert units.asked == []


def test_unused_connection_holds_nobody_up(address: Path) -> None:
    """The daemon connects early, to have the launcher started; others are answered meanwhile."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(address))
        assert ask(address, write_request(Act(Verb.PROBE))) == {"ok": True}
