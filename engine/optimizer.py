"""
AdamW on float32 master copies of a model's weights.

A bfloat16 number has 8 significant bits, so a weight of 0.02 does not move by less than some
0.00006: at a learning rate of 1e-6 nothing would be learned. The masters move, and the model
gets their rounded copies. Gradients are summed over micro-batches in float32 for the same
reason. Masters and Adam's two moments take 12 bytes a parameter, on the weights' device or, with
`offload`, in CPU memory. Weights that are float32 already are their own masters.

Weights, a reference, gradients, masters and moments take some 20 bytes a parameter: the 7.6 B
of Qwen2.5-Math-7B need 152 GB. So on a GPU that has less the masters go to CPU memory, unless
offload is False. Weight decay is 0.01, torch's default and the released trainer's.
"""
import torch


class MasterAdamW:
    def __init__(self, model, lr, offload=None):
        self.params = [p for p in model.parameters() if p.requires_grad]
        if offload is None and model.device.type == "cuda":
            memory = torch.cuda.get_device_properties(model.device).total_memory
            offload = 20 * sum(p.numel() for p in self.params) > memory
        self.offload = offload
        self.sums = {}  # float32 sums of the gradients of weights that are not float32
        self.masters = []
        for p in self.params:
            if p.dtype != torch.float32:
                p.register_post_accumulate_grad_hook(self.add)
            if p.dtype == torch.float32 and not offload:
                self.masters.append(p)
            else:
                device = "cpu" if offload else p.device
                self.masters.append(p.detach().to(device, torch.float32, copy=True))
        # fused: in CPU memory AdamW was 5 times as fast with it
        self.adam = torch.optim.AdamW(self.masters, lr=lr, fused=offload or None)

    def add(self, p):
        """Called by autograd after each backward: move a gradient into its float32 sum."""
        self.sums[p] = self.sums[p].add_(p.grad) if p in self.sums else p.grad.float()
        p.grad = None

    @torch.no_grad()
    def step(self, max_norm):
        """One step from the gradients so far, clipped to a total norm of `max_norm`.

        Gives (norm before clipping, share of the weights that changed, in a sample of at most
        some 10,000 of each tensor). Raises FloatingPointError, and changes nothing, where the
        norm is not finite.
        """
        grads = [self.sums.pop(p, p.grad) for p in self.params]  # None: p was not used
        norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None]).item()
        if not norm < float("inf"):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        scale = min(1.0, max_norm / (norm + 1e-6))
        for p, master, grad in zip(self.params, self.masters, grads):
            p.grad = None
            if grad is None or master.grad is None:
                master.grad = None if grad is None else grad.mul_(scale).to(master.device)
            else:  # in CPU memory: into the last step's, since new memory is slow at first touch
                master.grad.copy_(grad.mul_(scale))
        strides = [1 + m.numel() // 10_000 for m in self.masters]
        before = [m.flatten()[::n].clone() for m, n in zip(self.masters, strides)]
        self.adam.step()
        if not self.offload:
            self.adam.zero_grad()
        changed = 0
        for p, master, n, old in zip(self.params, self.masters, strides, before):
            changed += (master.flatten()[::n] != old).sum().item()
            if master is not p:
                p.copy_(master)
        return norm, changed / sum(len(old) for old in before)

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
