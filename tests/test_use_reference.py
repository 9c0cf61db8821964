"""`use_reference` holds where it is entered: in this thread and task, in what is compiled, and for backward passes."""

import asyncio
import threading

import pytest
import torch

from mlip_kernels import use_reference, weighted_mean
from mlip_kernels._operator import reference_requested
from mlip_kernels.testing import assert_identical

X = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graphs():
    """A backend of `torch.compile`, and for each graph it got whether that has a registered operator."""
    found = []

    def compile_graph(graph, inputs):
        found.append(any("mlip_kernels" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compile_graph.found = found
    yield compile_graph
    torch._dynamo.reset()


def in_another_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_it_nests_and_ends_with_an_error():
    def interrupted():
        with use_reference():
            with use_reference():
                assert reference_requested()
            assert reference_requested()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert not reference_requested()


def test_it_decorates_functions():
    assert use_reference()(reference_requested)()
    assert not reference_requested()


def test_other_threads_do_not_notice():
    with use_reference():
        assert not in_another_thread(reference_requested)

        def inside():
            with use_reference():
                return reference_requested()

        assert in_another_thread(inside)
    assert not reference_requested()


def test_other_tasks_of_the_thread_do_not_notice():
    async def inside(entered, leave):
        with use_reference():
            entered.set()
            await leave.wait()
            assert reference_requested()
            return await asyncio.to_thread(reference_requested)

    async def outside():
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, leave))
        await entered.wait()
        noticed = reference_requested()
        leave.set()
        return noticed, await task

    assert asyncio.run(outside()) == (False, True)


@pytest.mark.parametrize("where", ["here", "in another thread"])
@pytest.mark.parametrize("forward_inside", [False, True])
def test_backward_runs_on_what_its_forward_ran_on(forward_inside, where):
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.namespace)
            return function(*args, **(kwargs or {}))

    leaf = X.clone().requires_grad_()
    if forward_inside:
        with use_reference():
            y = weighted_mean(leaf)
    else:
        y = weighted_mean(leaf)

    def backward():
        with Count():
            y.sum().backward()

    def contrary():
        if forward_inside:
            return backward()
        with use_reference():
            return backward()

    contrary() if where == "here" else in_another_thread(contrary)
    assert ("mlip_kernels" in calls) is not forward_inside
    assert leaf.grad.isfinite().all()


def test_a_compiled_function_follows_it(graphs):
    compiled = torch.compile(weighted_mean, backend=graphs, fullgraph=True)
    expected = compiled(X)
    assert graphs.found == [True]
    with use_reference():
        compiled(X)
        assert graphs.found == [True, False]
        assert_identical(in_another_thread(lambda: compiled(X)), expected)
    compiled(X)
    assert graphs.found == [True, False]


def test_it_can_be_entered_in_a_compiled_function(graphs):
    def both(x):
        with use_reference():
            y = weighted_mean(x)
        return y, weighted_mean(x)

    def inside(x):
        with use_reference():
            return weighted_mean(x)

    torch.compile(inside, backend=graphs, fullgraph=True)(X)
    assert graphs.found == [False]
    torch.compile(both, backend=graphs, fullgraph=True)(X)
    assert graphs.found == [False, True]
    assert not reference_requested()
    assert not torch.compile(reference_requested, backend=graphs)()


def test_it_survives_a_graph_break(graphs):
    def broken(x):
        with use_reference():
            torch._dynamo.graph_break()
            return weighted_mean(x)

    torch.compile(broken, backend=graphs)(X)
    assert not any(graphs.found)
    assert not reference_requested()
