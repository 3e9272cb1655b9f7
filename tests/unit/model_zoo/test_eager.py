import torch

from model_zoo.ops.eager import eager


def test_an_eager_function_is_called_but_not_traced_by_a_compiled_one():
    seen = []

    @eager
    def increment(x):
        seen.append(torch.compiler.is_compiling())
        return x + 1

    def function(x):
        return 3 * increment(2 * x)

    x = torch.arange(3.0)
    compiled = torch.compile(function, backend="eager")
    assert torch.equal(compiled(x), 3 * (2 * x + 1)) and seen == [False]
    assert torch.equal(compiled(x), function(x)) and seen == 3 * [False]
