import importlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlflow_tdeploy.core.errors import BrokenDependencyError, ConflictError, InvalidInputError
from mlflow_tdeploy.core.extension import Registry


@pytest.fixture
def registry():
    registry = Registry("recipe")
    registry.register("int8")("the int8 recipe")
    registry.register("fp16")("the fp16 recipe")
    return registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two modules that register themselves, one shared helper and one list of what was imported."""
    folder = tmp_path / "toy_recipes"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mlflow_tdeploy.core.extension import Registry\n"
        "RECIPES = Registry('recipe', discover='toy_recipes')\nIMPORTED = []\n"
    )
    for name in ("one", "two", "_shared"):
        (folder / f"{name}.py").write_text(
            "import toy_recipes\n"
            f"toy_recipes.IMPORTED.append('{name}')\n"
            f"toy_recipes.RECIPES.register('{name}')('{name}')\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    import toy_recipes

    yield toy_recipes
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_recipes"]:
        del sys.modules[name]


def test_get_returns_what_was_registered(registry):
    assert registry.get("int8") == "the int8 recipe"
    assert registry.names() == ("fp16", "int8")
    assert list(registry) == ["the fp16 recipe", "the int8 recipe"]
    assert "int8" in registry
    assert "int4" not in registry


@pytest.mark.parametrize("name", ["int4", None, ["int8"]])
def test_get_lists_what_exists_when_name_is_unknown(registry, name):
    with pytest.raises(InvalidInputError, match=r"Unknown recipe .*Available: fp16, int8"):
        registry.get(name)


def test_get_says_none_when_nothing_is_registered():
    with pytest.raises(InvalidInputError, match="Available: none"):
        Registry("task").get("x")


def test_register_refuses_and_keeps_the_first_when_name_is_taken(registry):
    with pytest.raises(ConflictError, match="'int8': that name is taken by 'the int8 recipe'"):
        registry.register("int8")("another")
    assert registry.get("int8") == "the int8 recipe"


def test_unregister_frees_the_name_and_ignores_unknown_ones(registry):
    registry.unregister("int8")
    registry.unregister("int8")
    registry.register("int8")("another")
    assert registry.get("int8") == "another"


def test_registry_imports_its_package_on_first_use_only(package):
    assert package.IMPORTED == []
    assert package.RECIPES.names() == ("one", "two")
    assert package.RECIPES.get("two") == "two"
    assert package.IMPORTED == ["one", "two"]


def test_registry_finds_what_is_added_as_one_file(package):
    folder = package.__path__[0]
    with open(f"{folder}/three.py", "w") as file:
        file.write("import toy_recipes\ntoy_recipes.RECIPES.register('three')(3)\n")
    assert package.RECIPES.get("three") == 3


def test_threads_that_look_first_at_once_find_everything(package, caplog):
    (Path(package.__path__[0]) / "one.py").write_text(
        "import time, toy_recipes\ntime.sleep(0.3)\ntoy_recipes.RECIPES.register('one')('one')\n"
    )
    (Path(package.__path__[0]) / "three.py").write_text("import time\ntime.sleep(0.3)\n")
    importlib.invalidate_caches()

    def look(place):
        time.sleep(0.1 * place)
        return package.RECIPES.names()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(look, range(4))) == {("one", "two")}
    assert not caplog.records


def test_registry_tries_again_when_a_module_could_not_be_imported(package):
    broken = Path(package.__path__[0]) / "zero.py"
    broken.write_text("import a_package_that_does_not_exist\n")
    for _ in range(2):
        with pytest.raises(BrokenDependencyError, match="a_package_that_does_not_exist"):
            package.RECIPES.get("zero")
    broken.write_text("import toy_recipes\ntoy_recipes.RECIPES.register('zero')('mended')\n")
    importlib.invalidate_caches()
    assert package.RECIPES.get("zero") == "mended"


def test_a_module_that_fails_after_it_registered_something_does_not_block_itself(package):
    (Path(package.__path__[0]) / "half.py").write_text(
        "import toy_recipes\ntoy_recipes.RECIPES.register('half')('it')\nimport a_package_that_does_not_exist\n"
    )
    for _ in range(2):
        assert package.RECIPES.get("one") == "one"
        assert package.RECIPES.names() == ("one", "two")


def test_a_module_that_cannot_be_imported_leaves_the_others_and_says_why_when_it_is_wanted(package, caplog):
    (Path(package.__file__).parent / "broken.py").write_text("raise OSError('libfoo.so: cannot open')")
    assert package.RECIPES.names() == ("one", "two")
    assert "libfoo.so: cannot open" in caplog.text
    with pytest.raises(BrokenDependencyError, match=r"'toy_recipes\.broken'.*OSError: libfoo.so: cannot.*reinstall"):
        package.RECIPES.get("broken")
