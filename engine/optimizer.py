"""
AdamW on float32 master copies of a model's weights.

A bfloat16 number has 8 significant bits, so a weight of 0.02 does not move by less than about
0.00006: at a learning rate of 1e-6 nothing would be learned. The masters move, and the model
gets their rounded copies. Gradients are summed over micro-batches in float32 for the same
reason. Weights that are float32 already are their own masters, if they are not offloaded, and
their gradients are summed by autograd. The learning rate is constant: a schedule would set
adam.param_groups[0]["lr"] from the step's number, so that a resumed run has it, too.

Masters and Adam's two moments take 12 bytes a parameter, on the weights' device or, with
`offload`, in CPU memory. Weights, a reference, gradients, masters and moments take about 20 bytes
a parameter: the 7.6 B of Qwen2.5-Math-7B need 152 GB. So on a GPU that has less, masters and
moments go to CPU memory, unless offload is False. Weight decay is 0.01, torch's default and the
released trainer's.
"""
import math

import torch

from tasks.errors import UserError


def scale_down(grads, norm, max_norm):
    """Scale gradients of a total norm to at most `max_norm`, in place: the norm before. Raises
    UserError, and changes nothing, where it is not finite."""
    if not math.isfinite(norm):
        raise UserError(f"the gradient's norm is {norm}, so the step is not taken and the last "
                        "checkpoint holds; a lower --lr may help, or --dtype float32")
    for grad in grads:
        grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


class MasterAdamW:
    def __init__(self, model, lr, offload=None):
        self.params = [p for p in model.parameters() if p.requires_grad]
        if offload is None and model.device.type == "cuda":
            memory = torch.cuda.get_device_properties(model.device).total_memory
            offload = 20 * sum(p.numel() for p in self.params) > memory
        self.offload = offload
        self.sums = {}  # {weight that is not float32: float32 sum of its gradients}
        self.masters = []
        for p in self.params:
            if p.dtype != torch.float32:
                p.register_post_accumulate_grad_hook(self.add)
            if p.dtype == torch.float32 and not offload:
                self.masters.append(p)
            else:
                device = "cpu" if offload else p.device
                self.masters.append(p.detach().to(device, torch.float32, copy=True))
        # fused: in CPU memory AdamW was 12 times as fast with it, and needed no copies of weights
        large = sum(master.numel() for master in self.masters) > 2**20
        fused = offload or (large and model.device.type == "cpu") or None
        self.adam = torch.optim.AdamW(self.masters, lr=lr, fused=fused)

    def add(self, p):
        """Called by autograd after each backward: move a gradient into its float32 sum."""
        self.sums[p] = self.sums[p].add_(p.grad) if p in self.sums else p.grad.float()
        p.grad = None

    def grads(self):
        """The summed gradient of each weight, None for a weight that was not used."""
        return [self.sums.get(p, p.grad) for p in self.params]

    @torch.no_grad()
    def clip(self, max_norm):
        """Scale the summed gradients to a total norm of at most `max_norm`: the norm before.

        Raises UserError where the norm is not finite. No weight has changed then.
        """
        grads = [grad for grad in self.grads() if grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        return scale_down(grads, norm, max_norm)

    @torch.no_grad()
    def step(self):
        """Move the masters by the summed gradients, and give the model their rounded copies."""
        for master, grad in zip(self.masters, self.grads()):
            if grad is None:  # the weight was not used
                master.grad = None
            elif master.grad is None:
                master.grad = grad.to(master.device)
            elif master.grad is not grad:  # offload: reuse its memory, since new memory is slow
                master.grad.copy_(grad)
        self.adam.step()
        for p, master in zip(self.params, self.masters):
            if master is not p:
                p.copy_(master)

    def zero_grad(self):
        """Forget the gradients. With offload master.grad stays allocated; `step` overwrites it."""
        self.sums.clear()
        for p in self.params:
            p.grad = None
        if not self.offload:
            self.adam.zero_grad()

    def state_dict(self):
        """What a resumed run needs: Adam's moments, and masters that are not the weights."""
        masters = {}
        for i, (p, master) in enumerate(zip(self.params, self.masters)):
            if master is not p:
                masters[i] = master
        return {"adam": self.adam.state_dict()["state"], "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state):
        groups = self.adam.state_dict()["param_groups"]  # this run's learning rate
        self.adam.load_state_dict({"state": state["adam"], "param_groups": groups})
        for i, master in state["masters"].items():
            self.masters[i].copy_(master)
