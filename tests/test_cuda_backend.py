"""CUDA C++ beside Triton: which of the two runs a call on a GPU, how one finds out, and how the extension is
built. Decisions are made on fake tensors, so none of this needs a GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import cuda_check
import pytest
import torch
from conv_cases import Case
from torch._subclasses.fake_tensor import FakeTensorMode

import gconv
from gconv import backend, gpu, schemas

ROOT = Path(__file__).resolve().parent.parent
NOT_BUILT = "the extension gconv._cuda is not built: try harder"
GROUPED = [schema for schema in schemas.schemas() if schema.startswith("grouped_conv_")]
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or not sys.platform.startswith("linux"), reason="nvcc is not on PATH"
)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """The rules as they are where both kinds of kernels are there."""
    monkeypatch.setattr(gpu, "_missing_cuda", None)
    monkeypatch.setattr(gpu, "missing_triton", lambda: None)
    with gconv.use_backend("auto"), gconv.set_policy("warn_once"):
        yield


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(gpu, "_missing_cuda", NOT_BUILT)


MODE = FakeTensorMode()


def on_gpu(*size, dtype=torch.bfloat16):
    with MODE:
        return torch.empty(size, dtype=dtype, device="cuda:0")


def conv(channels=8, groups=2, dtype=torch.bfloat16, kernel=3, out=None):
    x = on_gpu(2, channels, 8, 8, dtype=dtype)
    weight = on_gpu(out or channels, channels // groups, kernel, kernel, dtype=dtype)
    return x, weight, None, 1, kernel // 2, 1, groups


# ----------------------------------------------------------------------------------------------- the decision


@half_types
@pytest.mark.parametrize(
    "channels, groups, out, ours",
    [(128, 32, None, "cuda"), (63, 1, None, "cuda"), (64, 1, None, "triton"), (32, 32, 64, "cuda"),
     (8, 1, 64, "triton"), (224, 2, None, "triton"), (1024, 32, None, "cuda")],
)  # fmt: skip
def test_narrow_groups_go_to_cuda_and_wide_ones_to_triton(dtype, channels, groups, out, ours):
    decision = backend.choose("grouped_conv", *conv(channels, groups, dtype, out=out))
    assert decision == (ours, f"{ours}.grouped_conv", None, False)


def test_float32_has_a_bound_of_its_own():
    kernels = [backend.choose("grouped_conv", *conv(c, 1, torch.float32)).backend for c in (15, 16)]
    assert kernels == ["cuda", "triton"]
    assert not gpu.prefers_cuda(torch.float64, (8, 1, 3, 3), 8)


def test_what_has_a_convolution_inside_is_named_after_it():
    narrow, wide = conv(), conv(64, 1)
    assert backend.choose("conv_bn_relu", *narrow).kernel == "cuda.conv_bn_relu"
    assert backend.choose("conv_bn_relu", *wide).kernel == "triton.conv_bn_relu"
    assert backend.whole("bottleneck", narrow[0], narrow[1], 2).kernel == "cuda.bottleneck"
    assert backend.whole("dense_block", wide[0], wide[1], 1).kernel == "triton.dense_block"


def test_what_only_triton_has_is_its_own():
    for op, call in (("batch_norm", conv()[:1]), ("pointwise_conv", conv(kernel=1, groups=1))):
        assert backend.choose(op, *call) == ("triton", f"triton.{op}", None, False)
        with gconv.use_backend("cuda"):
            reason = "use_backend('cuda'): only Triton has this op"
            assert backend.choose(op, *call) == ("triton", f"triton.{op}", reason, False)


def test_use_backend_forces_either():
    for channels, groups in ((8, 2), (64, 1)):
        for name in ("cuda", "triton"):
            with gconv.use_backend(name):
                decision = backend.choose("grouped_conv", *conv(channels, groups))
                assert decision == (name, f"{name}.grouped_conv", None, False)


@pytest.mark.parametrize(
    "mode, reason",
    [("cuda", "device: want cuda, got cpu"), ("triton", "device: want cuda, or TRITON_INTERPRET=1, got cpu")],
)
def test_a_tensor_on_the_cpu_is_refused(monkeypatch, mode, reason):
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3)
    with gconv.use_backend(mode), pytest.raises(RuntimeError) as caught:
        gconv.functional.grouped_conv(x, weight, groups=4)
    assert (
        str(caught.value) == f"gconv.grouped_conv: use_backend('{mode}') does not cover this call: {reason}"
    )


def test_a_tensor_on_a_gpu_is_refused_by_the_cpu():
    with gconv.use_backend("cpu"), pytest.raises(RuntimeError, match="device: want cpu, got cuda"):
        backend.choose("grouped_conv", *conv())


def test_without_the_extension_triton_runs_and_says_why(not_built):
    assert backend.choose("grouped_conv", *conv()) == ("triton", "triton.grouped_conv", NOT_BUILT, False)
    assert backend.choose("grouped_conv", *conv(64, 1)).reason is None, "Triton is the choice there anyway"
    with gconv.use_backend("triton"):
        assert backend.choose("grouped_conv", *conv()).reason is None
    with gconv.trace() as trace:
        backend.record(backend.choose("conv_bn_relu", *conv()), "conv_bn_relu", conv()[0])
    assert [(row.kernel, row.reason) for row in trace] == [("triton.conv_bn_relu", NOT_BUILT)]
    with gconv.use_backend("cuda"), pytest.raises(RuntimeError, match=re.escape(NOT_BUILT)):
        backend.choose("grouped_conv", *conv())


def test_without_triton_the_convolution_alone_is_left(monkeypatch):
    monkeypatch.setattr(gpu, "missing_triton", lambda: "no Triton")
    assert backend.choose("grouped_conv", *conv()).kernel == "cuda.grouped_conv"
    for op, call in (("conv_bn_relu", conv()), ("grouped_conv", conv(64, 1)), ("batch_norm", conv()[:1])):
        assert backend.choose(op, *call).reason == "no Triton", op


@pytest.mark.parametrize(
    "architecture, capability, runs",
    [("sm_80", (8, 0), True), ("sm_80", (8, 9), True), ("sm_89", (8, 6), False), ("sm_80", (9, 0), False),
     ("sm_90a", (9, 0), True), ("sm_90a", (10, 0), False), ("sm_100", (10, 3), True),
     ("sm_100", (12, 0), False), ("compute_89", (9, 0), True), ("compute_89", (8, 6), False),
     ("compute_100", (12, 1), True), ("compute_90a", (10, 0), False), ("sm_100f", (10, 3), True),
     ("compute_100f", (12, 0), False)],
)  # fmt: skip
def test_which_gpus_code_runs_on(architecture, capability, runs):
    assert gpu.runs_on(architecture, capability) is runs


def test_a_gpu_that_the_extension_is_not_built_for_goes_to_triton(monkeypatch):
    monkeypatch.setattr(gpu, "architectures", lambda: ("sm_80", "sm_90a"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu._unfit.cache_clear()
    try:
        decision = backend.choose("grouped_conv", *conv())
    finally:
        gpu._unfit.cache_clear()
    assert decision.backend == "triton"
    assert decision.reason == "gconv._cuda is built for sm_80, sm_90a, but the GPU has compute capability 7.5"


def test_a_call_is_traced_and_exported_as_on_a_gpu():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return gconv.functional.grouped_conv(x, weight, None, 1, 1, 1, 2)

    weight = conv()[1]
    with MODE, torch.no_grad():
        x = torch.empty_like(conv()[0], memory_format=torch.channels_last)
        with gconv.trace() as trace:
            y = Layer()(x, weight)
        program = torch.export.export(Layer(), (x, weight))
    assert [(row.kernel, row.reason) for row in trace] == [("cuda.grouped_conv", None)]
    assert y.shape == x.shape and y.device == x.device
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.gconv.grouped_conv_fwd.default in calls


# ---------------------------------------------------------------------------------------------- the launchers


def arguments(schema, case, dtype):
    """Fake arguments of an op by its schema, each optional one absent."""
    sizes = {"x": case.input_size, "weight": case.weight_size, "dy": case.output_size, "y": case.output_size}
    stride, padding, dilation, groups = case.geometry
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    given |= {"input_size": case.input_size, "weight_size": case.weight_size}
    types = re.findall(r"([\w\[\]()!]+\??) (\w+)(?:=\w+)?[,)]", schema.partition(" -> ")[0].partition("(")[2])
    values = []
    for kind, name in types:
        if name in given:
            values.append(given[name])
        elif kind == "bool":
            values.append(False)
        else:
            values.append(None if kind.endswith("?") else on_gpu(*sizes[name], dtype=dtype))
    return values


@pytest.mark.parametrize("schema", GROUPED, ids=lambda schema: schema.partition("(")[0])
@pytest.mark.parametrize("mode", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("width, groups", [(4, 3), (64, 1)])
def test_a_launcher_runs_what_the_decision_says(monkeypatch, schema, mode, width, groups):
    name, ran = schema.partition("(")[0], []
    monkeypatch.setattr(gpu, "on_cuda", lambda *args: ran.append(("cuda", args[0])))
    triton = type("module", (), {name: staticmethod(lambda *args: ran.append(("triton", name)))})
    monkeypatch.setitem(sys.modules, "gconv.kernels.grouped_conv", triton)
    case = Case(width, width, groups, 1, 5, 6)
    args = arguments(schema, case, torch.float16)
    with gconv.use_backend(mode):
        gpu._launcher(schema)(*args)
        x, weight = (on_gpu(*size, dtype=torch.float16) for size in (case.input_size, case.weight_size))
        decision = backend.choose("grouped_conv", x, weight, None, *case.geometry)
    assert ran == [(decision.backend, name)]


def test_a_launcher_without_the_extension_says_so(not_built):
    args = arguments(GROUPED[0], Case(4, 4, 2, 1, 5, 6), torch.float16)
    with gconv.use_backend("cuda"), pytest.raises(RuntimeError) as caught:
        gpu._launcher(GROUPED[0])(*args)
    assert str(caught.value) == f"grouped_conv_fwd: use_backend('cuda'): {NOT_BUILT}"


def test_names_of_arguments_are_those_of_the_ops():
    for schema in schemas.schemas():
        op = getattr(torch.ops.gconv, schema.partition("(")[0]).default
        assert gpu._arguments(schema) == [argument.name for argument in op._schema.arguments]


def test_tf32_is_as_in_torch():
    x, conv = torch.zeros(1), torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision, allowed in (("tf32", True), ("ieee", False)):
            conv.fp32_precision = precision
            assert gpu.tf32(x) is allowed and not gpu.tf32(x.half())
    finally:
        conv.fp32_precision = before


def run_python(code, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith("GCONV_")}
    package = os.path.dirname(os.path.dirname(gconv.__file__))
    env["PYTHONPATH"] = os.pathsep.join([package, env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env=env | environment, capture_output=True, text=True, timeout=600)


def test_an_extension_that_does_not_load_leaves_the_others(ops):
    done = run_python(
        """
        import sys

        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "gconv._cuda":
                    raise ImportError("libsomething.so.13: cannot open")

        sys.meta_path.insert(0, Broken())
        import torch, gconv
        from gconv import backend, info
        gconv.set_policy("error")
        gconv.functional.grouped_conv(torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3), groups=4)
        print(backend.counts(), info.collect()["backends"]["cuda"])
        """
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith(
        "{'cpu.grouped_conv': 1} the extension gconv._cuda did not load (libsomething.so.13: cannot open): "
    )


# -------------------------------------------------------------------------------------------------- the build


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, in a folder of its own with two .cu files and an nvcc that notes what it does."""
    spec = importlib.util.spec_from_file_location("gconv_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("one.cu", "two.cu", "both.h"):
        (tmp_path / "csrc" / "cuda" / name).write_text("")
    tool = tmp_path / "nvcc"
    tool.write_text(
        f"#!{sys.executable}\n"
        + textwrap.dedent(
            """
            import sys
            if "--list-gpu-code" in sys.argv:
                print("sm_75 sm_80 sm_90".replace(" ", "\\n"))
                raise SystemExit
            source, target, made = (sys.argv[sys.argv.index(name) + 1] for name in ("-c", "-o", "-MF"))
            open("log", "a").write(source + "\\n")
            open(target, "w").close()
            open(made, "w").write(f"{target} : {source} \\\\\\n csrc/cuda/both.h\\n")
            """
        )
    )
    tool.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("MAX_JOBS", "2")
    for name in ("GCONV_CUDA", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    spec.loader.exec_module(module)
    return module


def compiled(folder):
    """What nvcc has compiled since the last question."""
    log = folder / "log"
    sources = sorted(log.read_text().split()) if log.exists() else []
    log.unlink(missing_ok=True)
    return [Path(source).name for source in sources]


def test_only_what_changed_is_compiled_again(build, tmp_path):
    folder = str(tmp_path / "objects")
    objects = build.CudaObjects("nvcc").objects(folder)
    assert [Path(name).name for name in objects] == ["one.cu.o", "two.cu.o"]
    assert compiled(tmp_path) == ["one.cu", "two.cu"]
    assert build.CudaObjects("nvcc").objects(folder) == objects and compiled(tmp_path) == []
    later = os.path.getmtime(objects[0]) + 5
    os.utime("csrc/cuda/two.cu", (later, later))
    build.CudaObjects("nvcc").objects(folder)
    assert compiled(tmp_path) == ["two.cu"]
    os.utime("csrc/cuda/two.cu", (0, 0))
    os.utime("csrc/cuda/both.h", (later, later))
    build.CudaObjects("nvcc").objects(folder)
    assert compiled(tmp_path) == ["one.cu", "two.cu"]
    os.utime("csrc/cuda/both.h", (0, 0))
    build.CUDA_ARGS.append("-g")
    build.CudaObjects("nvcc").objects(folder)
    assert compiled(tmp_path) == ["one.cu", "two.cu"]


@pytest.mark.parametrize(
    "wanted, codes",
    [(None, ["sm_80", "sm_90a"]), ("8.0", ["sm_80"]), ("7.5;8.0+PTX 9.0a", ["sm_80", "compute_80", "sm_90a"]),
     ("7.0;7.5", [])],
)  # fmt: skip
def test_architectures(build, monkeypatch, wanted, codes):
    if wanted is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert build.CudaObjects("nvcc").codes == codes


@pytest.mark.parametrize(
    "wanted, message", [("Hopper", "want such as 8.0;9.0a+PTX, got Hopper"), ("12.0", "does not know 12.0")]
)
def test_architectures_that_there_are_not(build, wanted, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        build.gpu_codes("nvcc", wanted)


def test_when_it_is_built(build, monkeypatch, tmp_path):
    for asked, cuda, expected in (
        (None, None, False), (None, "13.0", True), ("0", "13.0", False), ("1", None, True),
    ):  # fmt: skip
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setenv("GCONV_CUDA", asked) if asked else monkeypatch.delenv("GCONV_CUDA", raising=False)
        assert (build.cuda_objects() is not None) == expected, (asked, cuda)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(SystemExit, match=r"GCONV_CUDA=1 asks for the CUDA kernels, but: .* 8\.0"):
        build.cuda_objects()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(
        SystemExit, match="GCONV_CUDA=1 asks for the CUDA kernels, but: nvcc is neither on PATH"
    ):
        build.cuda_objects()
    monkeypatch.delenv("GCONV_CUDA")
    assert build.cuda_objects() is None, "a CUDA torch without nvcc"


def test_the_check_compiles_as_the_build_does(build):
    assert [*build.CUDA_ARGS, "-Xptxas=-v"] == cuda_check.FLAGS


BUILD = """
import importlib.util, sys
from setuptools import setup
spec = importlib.util.spec_from_file_location("gconv_setup", "setup.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
library, temporary, *objects = sys.argv[1:]
module.CudaObjects.objects = lambda self, folder: objects
options = module.extension_options()
options["ext_modules"] = [e for e in options["ext_modules"] if e.name == "gconv._cuda"]
script_args = ["-q", "build_ext", "--build-lib", library, "--build-temp", temporary]
setup(name="gconv", packages=[], script_args=script_args, **options)
"""
USE = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("gconv._cuda", sys.argv[1])
sys.modules["gconv._cuda"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from gconv import gpu, info, schemas
for schema in schemas.schemas():
    name = schema.partition("(")[0]
    if name.startswith("grouped_conv_"):
        op = getattr(torch.ops.gconv_cuda, name).default
        want = str(getattr(torch.ops.gconv, name).default._schema).replace("gconv::", "gconv_cuda::")
        assert str(op._schema).count(", bool tf32=False, int stream=0") == 1
        assert str(op._schema).replace(", bool tf32=False, int stream=0", "") == want
print(gpu.missing_cuda(), info.collect()["backends"]["cuda"])
x, weight = torch.zeros(1, 4, 5, 5), torch.zeros(4, 1, 3, 3)
pair, none = [1, 1], (None, None, None)
for name, args in (
    ("fwd", (x, weight, pair, pair, pair, 4, *none, False)),
    ("fwd_into", (x, weight, pair, pair, pair, 4, *none, False, False, x)),
    ("fwd_stats", (x, weight, pair, pair, pair, 4, None)),
    ("bwd_input", (x, weight, [1, 4, 5, 5], pair, pair, pair, 4, None, *none)),
    ("bwd_weight", (x, x, [4, 1, 3, 3], pair, pair, pair, 4, *none)),
    ("bwd", (x, x, weight, pair, pair, pair, 4, *none, True, True, False)),
):
    try:
        getattr(torch.ops.gconv_cuda, "grouped_conv_" + name)(*args, tf32=True, stream=0)
    except RuntimeError as error:
        print(error)
"""


@needs_nvcc
def test_builds_for_one_gpu_and_loads_beside_any_torch(ops, tmp_path):
    """The whole of gconv._cuda: compiled, linked, loaded, and of no use to tensors on a CPU."""
    env = os.environ | {"GCONV_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    # nvcc takes a minute for the objects of test_cuda_check.py, which are kept.
    objects = [cuda_check.compiled(source, "sm_90a")[1] for source in cuda_check.sources()]
    assert None not in objects
    script, folders = tmp_path / "build.py", [str(tmp_path / "lib"), str(tmp_path / "temporary")]
    script.write_text(BUILD)
    command = [sys.executable, script, *folders, *objects]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    (library,) = Path(folders[0]).rglob("_cuda*.so")
    script.write_text(USE)
    env["PYTHONPATH"] = os.pathsep.join([os.path.dirname(os.path.dirname(gconv.__file__)), *sys.path[1:]])
    done = subprocess.run(
        [sys.executable, script, library], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, *refused = done.stdout.splitlines()
    assert first.startswith("None ") and "built for sm_90a" in first
    for line, (op, name) in zip(
        refused,
        (("fwd", "x"), ("fwd_into", "x"), ("fwd_stats", "x"), ("bwd_input", "dy"), ("bwd_weight", "x"),
         ("bwd", "dy")),
        strict=True,
    ):  # fmt: skip
        want = "want a CUDA tensor [N, C, H, W], got float32 [1, 4, 5, 5] on cpu"
        assert line == f"grouped_conv_{op}: {name}: {want}"
