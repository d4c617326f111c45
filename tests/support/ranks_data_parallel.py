"""What the processes of `tests.support.ranks` are asked to do with models whose parameters are divided (FSDP2)."""

import torch
import torch.nn.functional as F
from torch.distributed import pipelining
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor.parallel import parallelize_module

import fastattn
import fastattn.distributed as fd
from fastattn.nn import CausalLM, CausalLMConfig, RoPE
from tests.support import ranks_tensor_parallel as models
from tests.support.ranks_sharding import square

ROWS = 4


def make_lm(dtype=torch.float32, layers=2, **changes):
    torch.manual_seed(1)
    config = CausalLMConfig(
        vocab_size=18, d_model=32, num_layers=layers, num_heads=4, position=RoPE(), sinks=True, **changes
    )
    return CausalLM(config).to(dtype), torch.randint(0, 18, (ROWS, 9))


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def own_rows(tokens, rank, ranks):
    return tokens.chunk(ranks)[rank]


def layers_of(way):
    """One where each is compiled, which takes seconds."""
    return 1 if way == "compiled" else 2


def divided(mesh, way):
    """(model, the rows of this rank)"""
    model, tokens = make_lm(layers=layers_of(way), checkpoint=way == "compiled")
    if way == "compiled":
        for block in model.decoder.blocks:
            block.compile(backend="aot_eager")
    if way == "heads":
        parallelize_module(model, mesh, fd.tensor_parallel_plan(model, mesh.size()))
        return model, tokens
    if way == "hsdp":
        fd.fully_shard(model, mesh=square())
        return model, own_rows(tokens, mesh.get_local_rank(), mesh.size())
    if way in ("with_heads", "on_shards"):
        mesh = square()
        parallelize_module(model, mesh["tp"], fd.tensor_parallel_plan(model, 2, sequence=way == "on_shards"))
        mesh = mesh["dp"]
    fd.fully_shard(model, mesh=mesh)
    return model, own_rows(tokens, mesh.get_local_rank(), mesh.size())


def step(mesh, way):
    """The gradients of the whole batch, and the tokens that the model then generates."""
    model, tokens = divided(mesh, way)
    _, gradients = models.train_step(model, tokens)
    return gradients, fastattn.generate(model, torch.arange(6).view(2, 3), 5).tokens.tolist()


def methods(mesh, name):
    """An encoder-decoder's tokens, or what a converted stack of torch.nn gives step by step; without a mesh in one."""
    torch.manual_seed(2)
    if name == "encoder_decoder":
        model, tokens = models.make_model(name)
        if mesh is not None:
            fd.fully_shard(model, mesh=mesh)
        memory = model.encode(tokens)
        logits = model.decode(tokens, memory)
        return [memory.detach(), logits.detach(), fastattn.generate(model, tokens, 5, start=3).tokens]
    layer = torch.nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerDecoder(layer, 2, torch.nn.LayerNorm(16)).eval()
    fastattn.convert(model)
    if mesh is not None:
        fd.fully_shard(model, mesh=mesh)
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    with torch.no_grad():
        model(x, memory)
        cache = model.make_cache(memory, 3)
        return [torch.cat([model.step(x[:, i : i + 1], cache) for i in range(3)], 1)]


def train(model, optimizer, tokens, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        models.loss_of(model, tokens).backward()
        optimizer.step()


def save(mesh, folder, way):
    """A checkpoint after two steps."""
    model, tokens = divided(mesh, way)
    optimizer = make_optimizer(model)
    train(model, optimizer, tokens, 2)
    weights, state = get_state_dict(model, optimizer)
    state_dict_saver.save({"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=mesh.get_group())


def load(mesh, folder):
    """The weights after the checkpoint and one step more."""
    model, tokens = divided(mesh, "plain")
    optimizer = make_optimizer(model)
    weights, state = get_state_dict(model, optimizer)
    state_dict_loader.load({"model": weights, "optimizer": state}, checkpoint_id=folder, process_group=mesh.get_group())
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, tokens, 1)
    return {name: models.whole(p.detach()) for name, p in model.named_parameters()}


def trained(dtype):
    """The same in one process."""
    model, tokens = make_lm(dtype)
    train(model, make_optimizer(model), tokens, 3)
    return {name: p.detach() for name, p in model.named_parameters()}


def pipeline_step(mesh):
    """(loss, on the last rank, gradients of what this rank has): each has one of two blocks."""
    model, tokens = make_lm(checkpoint=False)
    rows = ROWS // 2  # of a microbatch
    pipe = pipelining.pipeline(
        model, (tokens[:rows],), split_spec={"decoder.blocks.1": pipelining.SplitPoint.BEGINNING}
    )
    stage = pipe.build_stage(mesh.get_local_rank(), torch.device("cpu"), mesh.get_group())

    def loss_of(logits, labels):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    schedule, losses = pipelining.ScheduleGPipe(stage, 2, loss_fn=loss_of), []
    if mesh.get_local_rank() == 0:
        schedule.step(tokens)
    else:
        schedule.step(target=tokens, losses=losses)
    gradients = {name: p.grad for name, p in stage.submod.named_parameters() if p.grad is not None}
    return sum(losses) / 2 if losses else None, gradients


def clipped(mesh, way):
    """(norm, gradients of the whole batch by name)"""
    model, tokens = divided(mesh, way)
    models.train_step(model, tokens)
    norm = fd.clip_grad_norm_(model.parameters(), 0.1)
    return norm, {name: models.whole(p.grad) for name, p in model.named_parameters()}
