"""The import rule of docs/design.md, and what no file may hold, read from the syntax trees of all sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {str(p.relative_to(ROOT)): p for top in ("nexus", "nexus_cli") for p in sorted((ROOT / top).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8"), name) for name, path in FILES.items()}

# Left to right; a file imports only from its own rank or from one to its left.
RANKS = (("errors", "config", "requests", "catalog", "atomic", "media", "rng", "phase", "system", "images", "naming",
          "stored", "memory", "videos", "sounds", "loudness", "keys"),
         ("nn",), ("process", "decode", "losses", "codecs", "text", "spectrograms"), ("models",),
         ("checkpoint", "turns", "convert", "train", "data", "evaluate"), ("api",))
BACKBONES = {"nexus.models.diffusion.unet", "nexus.models.diffusion.dit", "nexus.models.diffusion.mmdit",
             "nexus.models.diffusion.flux", "nexus.models.diffusion.ncsnpp", "nexus.models.diffusion.dit_llama"}
HEAVY = {"torch", "pydantic", "numpy", "PIL", "safetensors", "transformers", "av", "soundfile", "scipy"}
SANDBOX = "nexus/convert/sandbox.py"            # the one place that may look at a pickle, in a process of its own
PLAIN_YAML = "nexus/convert/plain_yaml.py"        # the safe loader, without aliases
FILE_LINES, BACKBONE_LINES, FUNCTION_LINES, LINE_LENGTH = 400, 500, 40, 120


def module_of(name):
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def rank(module):
    """0 = leftmost; None for what is not ours. The bare package (its version) stands left of everything."""
    parts = module.split(".")
    if parts[0] == "nexus_cli":
        return len(RANKS)
    if parts[0] != "nexus":
        return None
    if len(parts) == 1:
        return -1
    return next((i for i, names in enumerate(RANKS) if parts[1] in names), None)


def imports(tree, *, top=False):
    """(line, module) of every import, a `from a import b` of a module b as a.b; top: only what importing runs."""
    nodes = [n for n in (at_import(tree) if top else ast.walk(tree)) if isinstance(n, ast.Import | ast.ImportFrom)]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        else:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                path = whole.replace(".", "/")
                known = f"{path}.py" in FILES or f"{path}/__init__.py" in FILES
                yield node.lineno, whole if known else node.module


def at_import(node):
    """All nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def none_of(offenders):
    assert not offenders, "\n" + "\n".join(sorted(offenders))


# --- the import rule -----------------------------------------------------------------------------------------------

def test_every_file_has_a_place():
    lost = [n for n in FILES if rank(module_of(n)) is None]
    assert not lost, f"no rank for {lost}: add it to RANKS and to the design"


def test_files_import_only_to_their_left():
    none_of([f"{name}:{line} imports {module}" for name, tree in TREES.items() if name != "nexus/__init__.py"
             for line, module in imports(tree)
             if rank(module) is not None and rank(module) > rank(module_of(name))])


def test_imports_are_absolute():
    none_of([f"{name}:{node.lineno}" for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and (node.level or any(a.name == "*" for a in node.names))])


def test_systems_do_not_import_each_other():
    def allowed(mine, other):
        return other in BACKBONES or (mine.count(".") > 3 and mine.rpartition(".")[0] == other.rpartition(".")[0])
    none_of([f"{name}:{line} imports {module}" for name, tree in TREES.items() if name.startswith("nexus/models/")
             for line, module in imports(tree)
             if module.startswith("nexus.models.") and not allowed(module_of(name), module)])


def test_nothing_but_the_catalog_and_the_layouts_names_a_system():
    none_of([f"{name}:{line} imports {module}" for name, tree in TREES.items()
             if not name.startswith(("nexus/models/", "nexus/convert/layouts/"))
             for line, module in imports(tree) if module.startswith("nexus.models")])


def test_the_command_line_imports_nothing_heavy_at_module_level():
    none_of([f"{name}:{line} imports {module}" for name, tree in TREES.items() if name.startswith("nexus_cli/")
             for line, module in imports(tree, top=True) if module.split(".")[0] in HEAVY])


def test_help_needs_no_torch():
    code = ("import sys, nexus_cli.main as m\n"
            "for argv in (['--help'], ['train', '--help'], ['sample', 'ddpm', '--nope'], ['--version']):\n"
            "    try: m.main(argv)\n"
            "    except SystemExit: pass\n"
            f"print('HEAVY', sorted({HEAVY - {'pydantic'}!r} & set(sys.modules)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "HEAVY []" in out.stdout, out.stdout[-200:] + out.stderr[-2000:]


# --- what no file may hold -----------------------------------------------------------------------------------------

def dotted(node):
    """The source text of a called name: `torch.load`, `open`."""
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


def calls(tree):
    return [(n.lineno, dotted(n.func), n) for n in ast.walk(tree) if isinstance(n, ast.Call)]


def test_nothing_is_unpickled_or_evaluated():
    modules = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
    banned = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "torch.hub.load", "os.system",
              "os.popen", "tempfile.mktemp", "yaml.unsafe_load", "yaml.full_load"}
    found = [f"{name}:{line} imports {module}" for name, tree in TREES.items() if name != SANDBOX
             for line, module in imports(tree) if module.split(".")[0] in modules
             and (name, module) != (PLAIN_YAML, "yaml")]
    found += [f"{name}:{line} calls {called}" for name, tree in TREES.items() if name != SANDBOX
              for line, called, node in calls(tree)
              if called in banned or called.endswith(".extractall")
              or any(k.arg in ("shell", "allow_pickle", "trust_remote_code") and ast.unparse(k.value) != "False"
                     for k in node.keywords)]
    none_of(found)


def test_no_error_is_swallowed():
    none_of([f"{name}:{node.lineno}" for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.ExceptHandler)
             and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
             and not any(isinstance(n, ast.Raise | ast.Return | ast.Call) for n in ast.walk(node))])


def test_only_the_command_line_prints():
    none_of([f"{name}:{line} calls {called}" for name, tree in TREES.items()
             if not name.startswith("nexus_cli/") and name != SANDBOX
             for line, called, _ in calls(tree) if called in ("print", "sys.stdout.write", "sys.stderr.write")])


def test_only_the_atomic_writer_opens_files_for_writing():
    def writes(called, node):
        if called in ("torch.save", "np.save", "np.savez", "save_file"):
            return [ast.unparse(a) for a in node.args[1:]] != ["buffer"]        # into memory is no file
        if called.endswith((".write_text", ".write_bytes")):
            return not called.startswith("atomic.")
        mode = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
        return called in ("open", "io.open") and any(
            isinstance(m, ast.Constant) and isinstance(m.value, str) and set(m.value) & set("wax+") for m in mode)
    none_of([f"{name}:{line} {called}" for name, tree in TREES.items() if name not in ("nexus/atomic.py", SANDBOX)
             for line, called, node in calls(tree) if writes(called, node)])


def test_facts_are_raised_and_not_asserted():
    none_of([f"{name}:{node.lineno}" for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.Assert)])


def test_nothing_is_left_for_later():
    words = ("TODO", "FIXME", "XXX", "raise NotImplementedError", "for now")
    none_of([f"{name}:{i} {line.strip()}" for name, path in FILES.items()
             for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if any(w in line for w in words)])


def test_defaults_are_not_shared_between_calls():
    none_of([f"{name}:{node.lineno} {node.name}" for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef)
             for d in [*node.args.defaults, *node.args.kw_defaults] if isinstance(d, ast.List | ast.Dict | ast.Set)])


def test_files_are_short():
    limits = {n: BACKBONE_LINES if module_of(n) in BACKBONES else FILE_LINES for n in FILES}
    counts = {n: len(p.read_text("utf-8").splitlines()) for n, p in FILES.items()}
    none_of([f"{n}: {counts[n]} lines, {limits[n]} allowed" for n in FILES if counts[n] > limits[n]])


def test_lines_are_short():
    none_of([f"{name}:{i} has {len(line)} characters" for name, path in FILES.items()
             for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if len(line) > LINE_LENGTH])


def test_functions_are_short():
    def length(node):                           # of the body: a command's signature is its table of options
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        return node.end_lineno - body[0].lineno + 1 if body else 0
    none_of([f"{name}:{node.lineno} {node.name} has {length(node)} lines, {FUNCTION_LINES} allowed"
             for name, tree in TREES.items() for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef) and length(node) > FUNCTION_LINES])


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is(name):
    if FILES[name].read_text("utf-8").strip():
        assert ast.get_docstring(TREES[name]), f"{name} has no docstring"
    public = [n for n in TREES[name].body
              if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    none_of([f"{name}:{n.lineno} {n.name} has no docstring" for n in public if not ast.get_docstring(n)])


def test_the_linter_finds_nothing():
    made = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", ROOT], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
