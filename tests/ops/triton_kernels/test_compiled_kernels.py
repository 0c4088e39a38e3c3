"""What Triton's compiler makes of the kernels."""

import re
from importlib import import_module

import pytest
import torch

from ssprop_patch.ops import triton_kernels

from .places import Interpreter, calls

triton = pytest.importorskip("triton")
kernels = import_module("ssprop_patch.ops.triton_kernels.kernels")


class Compiler:
    """Stands in for the module of kernels: compiles for a GPU what is launched, keeps the code."""

    def __init__(self, target):
        self.target = target
        self.code = {}

    def __getattr__(self, name):
        kernel = getattr(kernels, name)
        return Launch(lambda *args, **constants: self.compile(kernel, args, constants))

    def compile(self, kernel, args, constants):
        from triton.compiler import ASTSource, compile

        options = {"num_warps": constants.pop("num_warps")}
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        names = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}
        signature, aligned = {}, {}
        for position, name in enumerate(kernel.arg_names):
            value = given[name]
            if torch.is_tensor(value):
                signature[name] = names[value.dtype]
                aligned[position,] = [["tt.divisibility", 16]]
            elif value is None or name in constants:
                signature[name] = "constexpr"
                constants[name] = value
            else:
                signature[name] = "i32"
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        self.code[kernel.__name__] = compile(source, target=self.target, options=options).asm


class Launch:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    ("memory_format", "shape", "width"),
    [
        ("contiguous", (2, 64, 8, 8), 4),
        ("contiguous", (2, 64, 14, 14), 2),
        ("channels_last", (2, 40, 7, 7), 4),
    ],
)
def test_they_compile_and_read_as_much_at_once_as_the_sizes_allow(
    monkeypatch, tmp_path, memory_format, shape, width
):
    from triton.backends.compiler import GPUTarget

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("triton names the alignment of arguments otherwise")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = Compiler(GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton_kernels, "kernels", compiler, raising=False)
    arguments = calls(Interpreter(None), shape, torch.bfloat16, memory_format)
    for function, given in arguments:
        function(*given)
    assert len(compiler.code) == 5
    for name, code in compiler.code.items():
        gathers = memory_format == "channels_last" and name in ("take_channels", "norm_input_grad")
        wide = re.findall(rf"ld\.global\S*\.v{width}\.b32", code["ptx"])
        assert bool(wide) is not gathers, name
        # Threads that read along another dimension than they write hand over in shared memory.
        assert name.endswith("sums") or "convert_layout" not in code["ttgir"], name
