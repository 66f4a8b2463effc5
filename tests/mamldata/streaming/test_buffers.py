"""Buffers are used again once nobody looks at them, and never before."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import torch

from mamldata.streaming.buffers import BufferPool

SHAPE = (2, 3, 5, 7, 1)


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(SHAPE, torch.float32)


class TestTake:
    @pytest.mark.parametrize(
        "dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    def test_shape_dtype_and_order_in_memory(self, dtype):
        """A tensor ``[B, images, C, H, W]``, channels-last in memory, and the same memory as a flat array."""
        tensor, memory = BufferPool((2, 3, 5, 7, 4), dtype).take()
        assert tensor.shape == (2, 3, 4, 5, 7)
        assert tensor.dtype == dtype
        assert tensor.stride() == (3 * 5 * 7 * 4, 5 * 7 * 4, 1, 7 * 4, 4)
        assert tensor.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert memory.shape == (2 * 3 * 5 * 7 * 4,)
        assert memory.ctypes.data == tensor.data_ptr()
        assert memory.itemsize == dtype.itemsize

    def test_what_is_written_through_the_array_is_in_the_tensor(self):
        """The array is ``[B, images, H, W, C]`` read in order."""
        tensor, memory = BufferPool((2, 3, 4, 5, 3), torch.uint8).take()
        values = np.arange(360, dtype=np.uint16).astype(np.uint8)
        memory[:] = values
        assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), values.reshape(2, 3, 4, 5, 3))


class TestReuse:
    def test_a_dropped_tensor_is_used_again(self, pool):
        """Taking and letting go, again and again, takes one buffer."""
        places = set()
        for _ in range(50):
            tensor, _ = pool.take()
            places.add(tensor.data_ptr())
            del tensor
        assert len(places) == 1

    def test_the_array_alone_does_not_keep_it(self, pool):
        """The array to fill through does not keep the memory lent: only the tensor does."""
        tensor, memory = pool.take()
        place = tensor.data_ptr()
        del tensor
        again, _ = pool.take()
        assert again.data_ptr() == place == memory.ctypes.data

    def test_a_held_tensor_is_not(self, pool):
        """Memory that somebody holds is never lent again, and keeps its content."""
        held = []
        for value in range(20):
            tensor, memory = pool.take()
            memory.view(np.float32)[:] = value
            held.append(tensor)
        assert len({tensor.data_ptr() for tensor in held}) == 20
        assert all((tensor == value).all() for value, tensor in enumerate(held))

    @pytest.mark.parametrize(
        "look",
        [
            lambda x: x[0],
            lambda x: x.flatten(0, 1),
            lambda x: x.permute(0, 1, 3, 4, 2).numpy(),
            lambda x: np.asarray(x)[1:, 2],
            lambda x: x.view(torch.int32),
            lambda x: x.detach(),
            lambda x: x.untyped_storage(),
            lambda x: torch.utils.dlpack.from_dlpack(x),
            lambda x: memoryview(x.permute(0, 1, 3, 4, 2).numpy()),
            lambda x: x[0].requires_grad_(),
            lambda x: torch.nn.Parameter(x),
        ],
        ids=[
            *("index", "flatten", "numpy", "numpy-slice", "view", "detach", "storage", "dlpack", "memoryview", "leaf"),
            "parameter",
        ],
    )
    def test_whatever_looks_at_the_memory_keeps_it(self, pool, look):
        """A view by any road keeps the buffer from being lent again; then it is free."""
        tensor, _ = pool.take()
        place = tensor.data_ptr()
        view = look(tensor)
        del tensor
        gc.collect()
        other, _ = pool.take()
        assert other.data_ptr() != place
        del view, other
        gc.collect()
        assert place in {buffer.ctypes.data for buffer in pool._free}

    def test_a_saved_input_of_a_graph_keeps_it(self, pool):
        """What a backward pass will need is not overwritten before it."""
        images, memory = pool.take()
        memory.view(np.float32)[:] = 3
        weight = torch.ones((), requires_grad=True)
        loss = (images * weight).sum()
        del images
        other, memory = pool.take()
        memory.view(np.float32)[:] = 100
        loss.backward()
        assert weight.grad == 3 * other.numel()

    def test_the_pool_may_go_before_its_tensors(self):
        """Tensors outlive their pool."""
        pool = BufferPool(SHAPE, torch.uint8)
        tensor, memory = pool.take()
        memory[:] = 7
        del pool, memory
        gc.collect()
        assert (tensor == 7).all()
        del tensor
        gc.collect()

    def test_other_threads_may_let_go(self, pool):
        """Taken in one thread and let go in another, no buffer is lent twice."""
        wrong = []

        def work(value: int) -> None:
            for _ in range(300):
                tensor, memory = pool.take()
                memory.view(np.float32)[:] = value
                if not (tensor == value).all():
                    wrong.append(value)
                del tensor

        threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(pool._free) <= 4
