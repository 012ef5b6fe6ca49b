"""Two processes: DistributedDataParallel, and PyTorch's fully_shard (FSDP 2), for our layers and for PEFT's."""

import os
from importlib.util import find_spec

import pytest
import reference as ref
import torch
from libraries import library, needs_torch_27
from processes import ended, started
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from flatlora import flat_lora_step, full, lora_parameters, lora_state_dict, perturbed, sam_step

pytestmark = needs_torch_27


def from_peft():
    """The tiny model with PEFT's layers, with the same names and weights."""
    peft = library("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"])
    model = peft.get_peft_model(ref.plain_model(), config)
    for p, value in zip(lora_parameters(model), ref.adapters(ref.adapted_model())):
        p.data = value
    return model


def in_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model, **policy):
    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if hasattr(module, "lora_A"):
            fully_shard(module, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def sharded_in_bfloat16():
    return sharded(ref.adapted_model().float(), mp_policy=MixedPrecisionPolicy(torch.bfloat16))


MODELS = {
    "DDP": lambda: in_ddp(ref.adapted_model()),
    "FSDP": lambda: sharded(ref.adapted_model()),
    "DDP of PEFT": lambda: in_ddp(from_peft()),
    "FSDP of PEFT": lambda: sharded(from_peft()),
    "FSDP in bfloat16": sharded_in_bfloat16,
}


def batches_of(step, rank):
    return [ref.batch(seed=100 * step + 10 * rank + i) for i in range(3)]


def different_noises(net, rank):
    """Three steps in which each process has a different eps."""
    optimizer = ref.sgd(net)
    for step in range(3):
        flat_lora_step(net, ref.loss_fn, batches_of(step, rank), optimizer, 0.3, (step, rank), max_grad_norm=0.2)


def same_noise(net, rank):
    optimizer = ref.sgd(net)
    for step in range(3):
        flat_lora_step(net, ref.loss_fn, batches_of(step, rank), optimizer, 0.3, step, max_grad_norm=0.2)


def sam(net, rank):
    optimizer = ref.sgd(net)
    for step in range(3):
        sam_step(net, ref.loss_fn, batches_of(step, rank), optimizer, rho=0.1, max_grad_norm=0.2)


TRAININGS = [different_noises, same_noise, sam]


def one_process(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name, make in MODELS.items():
        for train in TRAININGS if "PEFT" not in name or find_spec("peft") else []:
            net = make()
            train(net, rank)
            end = [full(p) for p in ref.adapters(net)]
            torch.save(end, f"{folder}/{name} {train.__name__} {rank}.pt")
            if name == "FSDP":
                torch.save(lora_state_dict(net), f"{folder}/state {rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads can abort a Python that exits normally (pytorch/pytorch#179291)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which two processes have saved their results."""
    folder = tmp_path_factory.mktemp("processes")
    processes = [started(one_process, rank, folder) for rank in (0, 1)]
    assert [ended(process) for process in processes] == [0, 0]
    return folder


def expected_end(train):
    """A and B after three steps of one process, with the mean gradient over both noises and all batches."""
    model = ref.adapted_model()
    optimizer = ref.sgd(model)
    for step in range(3):
        if train is sam:
            sam_step(model, ref.loss_fn, batches_of(step, 0) + batches_of(step, 1), optimizer, 0.1, max_grad_norm=0.2)
            continue
        optimizer.zero_grad()
        for rank in (0, 1):
            with perturbed(model, 0.3, (step, rank) if train is different_noises else step):
                for batch in batches_of(step, rank):
                    (ref.dense_loss(model, batch) / 6).backward()
        nn.utils.clip_grad_norm_(lora_parameters(model), 0.2)
        optimizer.step()
    return ref.adapters(model)


@pytest.mark.parametrize("train", TRAININGS)
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_give_the_same_steps_as_one(folder, name, train):
    if "PEFT" in name:
        library("peft")
    start, expected = ref.adapters(ref.adapted_model()), expected_end(train)
    moves = [p - before for p, before in zip(expected, start)]
    tolerance = 0.05 if "bfloat16" in name else 1e-6
    for rank in (0, 1):
        given = torch.load(f"{folder}/{name} {train.__name__} {rank}.pt")
        errors = [one - other for one, other in zip(given, expected)]
        assert ref.norm_of(errors) < tolerance * ref.norm_of(moves)


def test_the_state_of_a_sharded_model_is_complete(folder):
    names = list(lora_state_dict(ref.adapted_model()))
    for rank in (0, 1):
        state = torch.load(f"{folder}/state {rank}.pt")
        assert list(state) == names
        *adapters, _, _ = state.values()
        ref.assert_same_bits(adapters, torch.load(f"{folder}/FSDP sam {rank}.pt"))
