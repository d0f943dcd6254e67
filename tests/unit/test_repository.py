"""What holds for the whole repository: pinned installs, its size, safe weights, container files."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from typer.main import get_command

from server.cli import app

ROOT = Path(__file__).resolve().parents[2]
MAX_TRACKED_BYTES = 48 * 2**20
# Formats that can run code when they are loaded.
PICKLE_SUFFIXES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
SHELL_BLOCK = re.compile(r"^```(?:bash|console|sh|shell)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAKE_CALL = re.compile(r"(?:^|&&|;)\s*(?:\w+=\S+\s+)*make((?: +[\w.=/-]+)+)", re.MULTILINE)
MAKE_VARIABLE = re.compile(r"^(\w+) \?= ", re.MULTILINE)
MAKE_TARGET = re.compile(r"^([a-z-]+):(?!=)", re.MULTILINE)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of tracked files")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    # A file deleted in the working tree is still listed.
    names = [name for name in listing.stdout.split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def declared_dependencies(project: dict) -> list[Requirement]:
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def imported_modules(path: Path) -> set[str]:
    """Top-level names of every module that a source file imports, at any depth of it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


def test_every_constraint_is_one_exact_public_version(constraints):
    for pin in constraints.values():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        # A local version such as 2.13.0+cpu exists on one index only.
        assert Version(specifier.version).local is None, pin


def test_every_declared_dependency_is_pinned_within_its_bounds(project, constraints):
    for dependency in declared_dependencies(project):
        pin = constraints.get(canonicalize_name(dependency.name))
        assert pin is not None, f"{dependency.name} is missing from constraints.txt"
        (specifier,) = pin.specifier
        assert dependency.specifier.contains(specifier.version), f"{pin} is outside {dependency}"


@pytest.mark.parametrize("package", ["model", "server"])
def test_every_imported_distribution_is_declared(package, project):
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    providers = packages_distributions()
    for path in (ROOT / package).rglob("*.py"):
        # triton is part of torch's CUDA build, and used where there is one.
        known = sys.stdlib_module_names | {"model", "server", "triton"}
        for module in imported_modules(path) - known:
            names = {canonicalize_name(name) for name in providers.get(module, [])}
            assert names & declared, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("name", ["Makefile", "Dockerfile", "README.md", "CONTRIBUTING.md"])
def test_every_pip_install_uses_the_constraints(name):
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    for command in re.findall(r"pip install[^\n;&]*", text):
        assert "-c constraints.txt" in command, f"{name}: {command}"


def test_the_tracked_tree_stays_small(tracked_files):
    total = sum(path.stat().st_size for path in tracked_files)
    assert total < MAX_TRACKED_BYTES, f"{total / 2**20:.1f} MiB are tracked"


def test_no_pickled_weights_are_tracked(tracked_files):
    assert [path for path in tracked_files if path.suffix in PICKLE_SUFFIXES] == []


def test_tests_mirror_the_packages_they_test():
    for package in ("model", "server"):
        for folder in (ROOT / "tests" / "unit" / package).rglob("*/"):
            if folder.name != "__pycache__":
                source = ROOT / folder.relative_to(ROOT / "tests" / "unit")
                assert source.is_dir(), f"{folder.relative_to(ROOT)} mirrors no source folder"


@pytest.mark.parametrize("name", ["server", "server-cpu"])
def test_compose_mounts_the_weights_read_only_where_the_server_looks_for_them(compose, name):
    service = compose["services"][name]
    (mount,) = service["volumes"]
    assert mount["read_only"] is True
    model = PurePosixPath(service["environment"]["SPEECHLLM_MODEL"].replace("${CHECKPOINT:-", ""))
    assert model.parent == PurePosixPath(mount["target"])


def test_only_the_gpu_profile_reserves_an_nvidia_gpu(compose):
    gpu = compose["services"]["server"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert gpu["profiles"] == ["gpu"]

    cpu = compose["services"]["server-cpu"]
    assert "reservations" not in cpu["deploy"]["resources"]
    assert cpu["profiles"] == ["cpu"]


def test_prometheus_scrapes_a_name_and_port_both_profiles_answer_to(compose):
    prometheus = compose["services"]["prometheus"]
    assert set(prometheus["profiles"]) == {"gpu", "cpu"}
    config = yaml.safe_load((ROOT / prometheus["volumes"][0]["source"]).read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    ((target,),) = (entry["targets"] for entry in job["static_configs"])
    host, port = target.split(":")

    services = compose["services"]
    assert host in services
    assert host in services["server-cpu"]["networks"]["default"]["aliases"]
    assert all(services[name]["ports"][0].endswith(f":{port}") for name in ("server", "server-cpu"))
    assert f"EXPOSE {port}" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_image_leaves_root_before_it_starts():
    instructions = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    runtime = instructions[instructions.index("FROM ${BASE_IMAGE}") :]
    (user,) = (line.removeprefix("USER ") for line in runtime if line.startswith("USER "))
    uid = int(user.split(":")[0])  # Kubernetes' runAsNonRoot needs a number
    assert uid > 0


def test_every_file_the_image_copies_passes_dockerignore():
    admitted = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    copies = [
        line.split()[1:-1]
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ") and "--from" not in line
    ]
    assert {source for sources in copies for source in sources} == admitted
    assert all((ROOT / source).exists() for source in admitted)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_documented_make_commands_exist(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(MAKE_TARGET.findall(makefile))
    variables = set(MAKE_VARIABLE.findall(makefile))
    text = (ROOT / name).read_text(encoding="utf-8")
    commands = "\n".join(SHELL_BLOCK.findall(text) + re.findall(r"`([^`\n]+)`", text))
    called = [word for call in MAKE_CALL.findall(commands) for word in call.split()]

    assert called, f"{name} names no make command"
    for word in called:
        known = variables if "=" in word else targets
        assert word.split("=")[0] in known, f"{name}: make {word}"


def test_documented_speechllm_commands_exist():
    commands = get_command(app)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(SHELL_BLOCK.findall(text))
    calls = re.findall(r"\bspeechllm((?: +[a-z][a-z-]*)+)", blocks)

    assert calls, "README.md shows no speechllm command"
    for call in calls:
        first, *rest = call.split()
        command = commands.commands.get(first)
        assert command is not None, f"speechllm {first}"
        subcommands = getattr(command, "commands", None)
        if subcommands is not None:
            assert rest, f"speechllm {first} needs a subcommand"
            assert rest[0] in subcommands, f"speechllm {first} {rest[0]}"


def test_a_wheel_holds_the_page_and_the_types(tmp_path):
    source = tmp_path / "source"
    for package in ("model", "server"):
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    page = {f"server/web/{path.name}" for path in (ROOT / "server" / "web").iterdir()}
    assert len(page) > 5
    assert page | {"server/py.typed"} <= packed
