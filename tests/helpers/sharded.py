"""What each of two processes holds of a sharded base, and computes.

torchrun --nproc_per_node 2 -m tests.helpers.sharded
"""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mistral_ft.distributed import finish, join
from mistral_ft.model.loading import held_bytes, load_base
from tests.conftest import TINY


def main() -> None:
    join(60, on_gpu=False)
    whole, sharded = (load_base(TINY, torch.device("cpu"), share) for share in (False, True))
    layers = sharded.model.language_model.layers
    assert all(isinstance(p, DTensor) for p in layers.parameters())
    rest = held_bytes(whole)[0] - held_bytes(whole.model.language_model.layers)[0]
    assert held_bytes(sharded) == (rest + held_bytes(layers)[0], held_bytes(whole)[0])
    assert 2 * held_bytes(layers)[0] == held_bytes(layers)[1] == held_bytes(whole.model.language_model.layers)[0]

    ids = torch.arange(40, 60)[None]
    bounds = {"cu_seq_lens": torch.tensor([0, 20], dtype=torch.int32), "max_length": 20}

    def hidden(model: torch.nn.Module) -> torch.Tensor:
        model.config.text_config._attn_implementation = "packed"
        return model.model(input_ids=ids, use_cache=False, **bounds).last_hidden_state

    assert torch.equal(hidden(sharded), hidden(whole))

    # A trial that ran out of memory leaves layers gathered; the next one starts from shards again.
    forward = layers[2].mlp.forward
    layers[2].mlp.forward = lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError)
    try:
        hidden(sharded)
    except torch.OutOfMemoryError:
        layers[2].mlp.forward = forward
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    assert torch.equal(hidden(sharded), hidden(whole))
    print("as the whole", flush=True)
    finish()


if __name__ == "__main__":
    main()
