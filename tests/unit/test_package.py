import ast
import subprocess
import sys
from pathlib import Path

import llfast

PACKAGE = Path(llfast.__file__).parent
# Imports run one way: a module may import those to the left of it only.
ORDER = (
    "errors memory redaction s3 remote files cache texts results batches kernels safetensors_file "
    "quantised checkpoint weight_distances processor dtypes loading models head forward pointwise "
    "linear traits lens paging partial progress devices borrowing batchwise engines verify runs "
    "scoring layers rows shards scans compaction storefiles store where importing scores intervals "
    "diffusion basis mixed spacefile space stored_layers prediction trajectory search estimate "
    "model_list outcomes fleet nearest trajectory_scoring drawing relations comparison "
    "comparison_plots dendrogram neighbours placing places page map_plots mapping map_files "
    "trajectory_plots zoo_corpora zoo_training zoo_plan zoo demo output about cli_options bench "
    "cli_bench cli_texts cli_fleet_status cli_fleet cli_index cli_layers cli_compare cli_map "
    "cli_predict cli_trajectory cli __main__"
).split()
ONLY_IN = {
    "duckdb": {"where"},
    "faiss": {"search"},
    "xxhash": {"search"},
    "peft": {"loading"},
    "ray": {"fleet"},
    "compressed_tensors": {"quantised"},
    "matplotlib": {"drawing"},
    "openTSNE": {"placing"},
    "plotly": {"page"},
    "sklearn": {"prediction"},
    "adjustText": {"map_plots"},
    "transformers": {"linear", "loading", "models", "paging", "runs", "zoo_training", "bench"},
    "greenlet": {"paging"},
    "pyarrow": {"compaction", "shards", "store", "importing", "search", "where"},
    "s3fs": {"s3"},
    "fsspec": set(),
    "botocore": set(),
    "typer": {
        "cli",
        *(f"cli_{name}" for name in "bench compare fleet fleet_status index layers map".split()),
        *(f"cli_{name}" for name in "options predict texts trajectory".split()),
    },
    "triton": {"kernels", "bench"},
    "liger_kernel": {"bench"},
    "cut_cross_entropy": {"bench"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def imported(path):
    """(names of our own modules, names of other packages) that a file imports."""
    own, other = set(), set()
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            own |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            package, _, rest = node.module.partition(".")
            if package == "llfast":
                own |= {rest.split(".")[0]} if rest else {alias.name for alias in node.names}
            else:
                other.add(package)
        elif isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
    return own - {"__version__", "_native"}, other


def test_imports_run_one_way():
    for name, path in modules():
        assert name in ORDER, f"{path.name} is not in the order of modules"
        later = {each for each in imported(path)[0] if ORDER.index(each) >= ORDER.index(name)}
        assert not later - {name}, f"{path.name} imports {later}, which comes after it"


def test_special_packages_are_imported_in_few_files():
    for name, path in modules():
        for package, allowed in ONLY_IN.items():
            assert package not in imported(path)[1] or name in allowed, (path.name, package)


def test_public_names_are_sorted_and_there():
    assert llfast.__all__ == sorted(llfast.__all__)
    for name in llfast.__all__:
        assert getattr(llfast, name).__doc__, name


def test_importing_llfast_loads_neither_torch_nor_transformers():
    code = (
        "import sys, llfast; "
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'typer'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_is_long():
    for _, path in modules():
        assert len(path.read_text().splitlines()) <= 400, path.name
