"""The house: imports point downwards only, and importing the package costs little."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvhive

ROOT = Path(kvhive.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
TIERS = (  # from the ground up: a place knows places of lower tiers and its own alone
    {"registry", "kinds", "named", "plan", "step", "rope", "memory", "files", "units", "wrapping"},
    {"templates"},
    {"slots", "spec", "calibration", "plugins"},
    {"kernels", "budget"},
    {"policies", "allocations", "stores"},
    {"recipe", "model"},
    {"cache"},
    {"inference", "planning", "lengths"},
    {"learning"},
    {"comparison"},
    {"html"},
    {"evaluation"},
    {"engines"},
    {"cli"},
)
CORE = set().union(*TIERS[:7])
KNOWS_TRANSFORMERS = {"cache", "model"}


def house_part(module: Path) -> str:
    """The first part of a module's place below the package: `policies`, `cache`, ..."""
    return module.relative_to(ROOT).with_suffix("").parts[0]


def imports(module: Path) -> set[str]:
    """Full names of the modules that a module imports, those only for type checkers left out."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    checked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def known_of_ours(module: Path) -> set[str]:
    """Parts of the house that a module imports, its own left out."""
    names = {name.split(".")[1] for name in imports(module) if name.startswith("kvhive.")}
    return names - {house_part(module), "__version__"}


@pytest.mark.parametrize("tier", range(len(TIERS)))
def test_imports_point_downwards(tier: int) -> None:
    """Followed by hand from the command line to a kernel, the way never turns back."""
    below = set().union(*TIERS[:tier])
    parts = [module for module in MODULES if house_part(module) in TIERS[tier]]
    assert {house_part(module) for module in parts} == TIERS[tier]
    for module in parts:
        upwards = known_of_ours(module) - below
        assert not upwards, f"{module.relative_to(ROOT)} must not know {sorted(upwards)}"


def test_kernels_know_tensors_and_plain_values() -> None:
    for module in (ROOT / "kernels").glob("*.py"):
        assert known_of_ours(module) <= {"rope", "step"}, module


def test_few_modules_know_transformers() -> None:
    for module in MODULES:
        names = {name.split(".")[0] for name in imports(module)}
        if house_part(module) in CORE - KNOWS_TRANSFORMERS:
            assert "transformers" not in names, module


def test_nobody_asks_which_policy_it_is() -> None:
    """A method is known by its file and the registry alone."""
    policies = {path.stem for path in (ROOT / "policies").glob("*.py")} - {"__init__", "base"}
    for module in MODULES:
        if house_part(module) in CORE - {"policies"}:
            known = {name for name in imports(module) if name.startswith("kvhive.policies.")}
            assert not {name.split(".")[2] for name in known} & policies, module


def loaded_by(statement: str) -> set[str]:
    """Names of the modules that the statement loads, the standard library's left out."""
    script = f"import sys; before = set(sys.modules); {statement}; "
    script += "print('\\n'.join(sorted({name.split('.')[0] for name in sys.modules} - before)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split()) - set(sys.stdlib_module_names)


def test_importing_the_package_costs_nothing() -> None:
    assert loaded_by("import kvhive; dir(kvhive); kvhive.__version__") == {"kvhive"}


def test_importing_the_core_loads_torch_alone() -> None:
    torch_alone = loaded_by("import torch")
    ours = loaded_by(
        "import kvhive; kvhive.Recipe.parse('buzz@0.4'); kvhive.POLICIES, kvhive.Budget"
    )
    assert ours - torch_alone == {"kvhive"}


def test_importing_the_cache_adds_nothing_to_transformers() -> None:
    theirs = loaded_by(
        "import torch; from transformers import PreTrainedModel, AttentionInterface; "
        "import transformers.cache_utils, transformers.masking_utils; "
        "import transformers.integrations.sdpa_attention"
    )
    ours = loaded_by("import kvhive; kvhive.HiveCache")
    assert ours - theirs == {"kvhive"}
    assert not ours & {"pandas", "pyarrow", "matplotlib", "datasets", "ray", "lm_eval"}


def test_public_names_exist() -> None:
    assert set(kvhive.__all__) <= set(dir(kvhive))
    for name in kvhive.__all__:
        assert getattr(kvhive, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'hive_cache'"):
        _ = kvhive.hive_cache  # type: ignore[attr-defined]


def test_every_file_has_its_tier() -> None:
    assert {house_part(module) for module in MODULES} - {"__init__", "__main__"} == set().union(
        *TIERS
    )
