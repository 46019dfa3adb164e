"""The losses of UniAlignment (arXiv 2509.23760), equations (1) to (5), as plain functions of tensors.

Every loss is computed in float32 whatever the autocast type. Nothing here knows about models, data or devices; only the
contrastive loss looks beyond its arguments, to the other ranks of a distributed run.

Run alone to see each loss on random tensors:   python losses.py
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def _same_shape(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ, expected the same")


# ---------------------------------------------------------------- the two diffusions

def flow_matching_loss(velocity: Tensor, noise: Tensor, latents: Tensor, sigma: Tensor | None = None) -> Tensor:
    """Equation (1): mean squared error between the predicted velocity and e - x.

    velocity, noise e, latents x: (B, C, H, W). With sigma (B,) in (0, 1] the released code's form: the plain error of the
    predicted clean latents, input - sigma * velocity, which is sigma^2 times equation (1).
    """
    _same_shape("flow_matching_loss", velocity, noise)
    _same_shape("flow_matching_loss", noise, latents)
    error = velocity.float() - (noise.float() - latents.float())                              # (B, C, H, W)
    if sigma is not None:
        if sigma.shape != latents.shape[:1]:
            raise ValueError(f"flow_matching_loss: sigma has shape {tuple(sigma.shape)}, expected ({len(latents)},)")
        error = error * sigma.float().view(-1, 1, 1, 1)                                       # (B, C, H, W)
    return error.square().mean()


def masked_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor, t: Tensor, answer: Tensor | None = None) -> Tensor:
    """Equation (2): cross entropy of the masked tokens, weighted by 1/t, averaged over all positions.

    logits (B, L, vocab), the last class being the mask token, which is never an answer and gets no probability; tokens (B, L)
    the clean ids; mask (B, L) bool, True where masked; t (B,) in (0, 1] the masking probabilities. answer (B, L) bool: in
    question answering only these positions count. Padding is predicted like any other token.
    """
    _same_shape("masked_token_loss", tokens, mask)
    _same_shape("masked_token_loss (answer)", tokens, mask if answer is None else answer)
    if logits.shape[:2] != tokens.shape or t.shape != tokens.shape[:1]:
        raise ValueError(f"masked_token_loss: logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}, t {tuple(t.shape)}; "
                         "expected (B, L, vocab), (B, L), (B,)")
    rows, columns = (mask if answer is None else mask & answer).nonzero(as_tuple=True)
    error = F.cross_entropy(logits[rows, columns, :-1].float(), tokens[rows, columns], reduction="none")    # (masked,)
    return (error / t.float()[rows]).sum() / tokens.numel()


# ---------------------------------------------------------------- the two alignments

class _Gather(torch.autograd.Function):
    """All ranks' rows in rank order. Backward: every rank's gradient for a row goes back to the rank that the row came from."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        ctx.rows = len(x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.rows:][:ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all ranks, (B, d) -> (world * B, d), with gradient to every rank; outside a distributed run x itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Gather.apply(x)
    return x


def contrastive_loss(image_hidden: Tensor, text_hidden: Tensor, temperature: float = 0.07, symmetric: bool = True,
                     gather: bool = True) -> Tensor:
    """Equation (3), cross-modal alignment: InfoNCE of mean-pooled final hidden states over the global batch of all ranks.

    image_hidden (B, N, D) and text_hidden (B, L, D) of the same pairs, same B on every rank. symmetric: the mean of
    image-to-text and text-to-image, else image-to-text only. gather: False where only one rank computes. Every rank returns the
    loss of the whole batch, so that the mean of the ranks' gradients is its gradient.
    """
    if image_hidden.ndim != 3 or text_hidden.ndim != 3 or image_hidden.shape[::2] != text_hidden.shape[::2]:
        raise ValueError(f"contrastive_loss: shapes {tuple(image_hidden.shape)} and {tuple(text_hidden.shape)}, "
                         "expected (B, N, D) and (B, L, D)")
    with torch.autocast(image_hidden.device.type, enabled=False):
        image, text = (hidden.float().mean(dim=1) for hidden in (image_hidden, text_hidden))  # (B, D) each
        if gather:
            image, text = gather_with_gradient(image), gather_with_gradient(text)             # (G, D) each
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        similarity = image @ text.T / temperature                                             # (G, G)
        pairs = torch.arange(len(similarity), device=similarity.device)
        loss = F.cross_entropy(similarity, pairs)
        return (loss + F.cross_entropy(similarity.T, pairs)) / 2 if symmetric else loss


def intrinsic_loss(image_mid: Tensor, teacher_image: Tensor, text_mid: Tensor, teacher_text: Tensor,
                   released: bool = False) -> Tensor:
    """Equation (4), intrinsic alignment: minus the cosine to the frozen teacher, of the image plus of the text; all (B, d).

    released: the released code's form, which has 1 - cosine for each (the same gradient, a value in [0, 4] instead of [-2, 2]).
    """
    _same_shape("intrinsic_loss (image)", image_mid, teacher_image)
    _same_shape("intrinsic_loss (text)", text_mid, teacher_text)
    image = F.cosine_similarity(image_mid.float(), teacher_image.float(), dim=-1)             # (B,)
    text = F.cosine_similarity(text_mid.float(), teacher_text.float(), dim=-1)                # (B,)
    return 2 * float(released) - (image + text).mean()


def total_loss(image: Tensor, text: Tensor, cross: Tensor | float = 0.0, intrinsic: Tensor | float = 0.0,
               text_weight: float = 0.2, cross_weight: float = 0.05, intrinsic_weight: float = 0.1) -> Tensor:
    """Equation (5): L = L_img + 0.2 L_txt + 0.05 L_cross + 0.1 L_intrinsic."""
    return image + text_weight * text + cross_weight * cross + intrinsic_weight * intrinsic


if __name__ == "__main__":
    torch.manual_seed(0)
    x, e, v = torch.randn(3, 4, 16, 8, 8)
    ids, masked, probability = torch.randint(0, 39, (4, 12)), torch.rand(4, 12) < 0.5, torch.full((4,), 0.5)
    print("(1) flow matching", flow_matching_loss(v, e, x).item())
    print("(2) masked tokens", masked_token_loss(torch.randn(4, 12, 40), ids, masked, probability).item())
    print("(3) contrastive  ", contrastive_loss(torch.randn(4, 16, 32), torch.randn(4, 12, 32)).item())
    print("(4) intrinsic    ", intrinsic_loss(*torch.randn(4, 4, 32)).item())
