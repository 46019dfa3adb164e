"""The losses of UniAlignment (arXiv 2509.23760), equations (1) to (5), as functions of tensors.

Notation: x clean latents, e noise, v the predicted velocity, sigma the noise level, t the masking
probability. Every loss is computed in float32 whatever the autocast type. Nothing here depends on
models, data or devices; only the contrastive loss sees other ranks of a distributed run.

Run alone to see each loss on random tensors:   python losses.py
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def _same_shape(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ, expected "
                         "the same")


# ---------------------------------------------------------------- the two diffusions

def flow_matching_loss(velocity: Tensor, noise: Tensor, latents: Tensor,
                       sigma: Tensor | None = None) -> Tensor:
    """Equation (1), flow matching:  L_img = E || v - (e - x) ||^2,  the mean squared error.

    velocity v, noise e, latents x: (B, C, H, W). With sigma (B,) in (0, 1] the released code's
    form: the plain error of the predicted clean latents, z - sigma v, which is sigma^2 times
    equation (1).
    """
    _same_shape("flow_matching_loss", velocity, noise)
    _same_shape("flow_matching_loss", noise, latents)
    error = velocity.float() - (noise.float() - latents.float())                    # (B, C, H, W)
    if sigma is not None:
        if sigma.shape != latents.shape[:1]:
            raise ValueError(f"flow_matching_loss: sigma has shape {tuple(sigma.shape)}, expected "
                             f"({len(latents)},)")
        error = sigma.float().view(-1, 1, 1, 1) * error                             # (B, C, H, W)
    return error.square().mean()


def sum_over_all_positions(logits: Tensor, tokens: Tensor, counted: Tensor, t: Tensor) -> Tensor:
    """`masked_token_loss` from the errors at all positions.

    Trick for speed on a GPU: the CPU would have to wait for it to learn how many are counted.
    """
    error = F.cross_entropy(logits.flatten(0, 1)[:, :-1].float(), tokens.flatten(),
                            reduction="none")                                       # (B L,)
    weight = counted / t.float()[:, None]                                           # (B, L)
    return torch.where(counted, error.view_as(tokens) * weight, 0).sum() / tokens.numel()


def masked_token_loss(logits: Tensor, tokens: Tensor, mask: Tensor, t: Tensor,
                      answer: Tensor | None = None) -> Tensor:
    """Equation (2), masked diffusion:  L_txt = E [ 1/t sum_masked -log p(token) ] / L.

    logits (B, L, vocab), whose last class, the mask token, is never a target and gets no
    probability; tokens (B, L) the clean ids; mask (B, L) bool, True where masked; t (B,) in (0, 1]
    the masking probabilities. answer (B, L) bool: count only these positions, in question
    answering. Padding is predicted like any other token.
    """
    _same_shape("masked_token_loss", tokens, mask)
    _same_shape("masked_token_loss (answer)", tokens, mask if answer is None else answer)
    if logits.shape[:2] != tokens.shape or t.shape != tokens.shape[:1]:
        raise ValueError(f"masked_token_loss: logits {tuple(logits.shape)}, "
                         f"tokens {tuple(tokens.shape)}, t {tuple(t.shape)}; "
                         "expected (B, L, vocab), (B, L), (B,)")
    counted = mask if answer is None else mask & answer                             # (B, L)
    if logits.is_cuda:
        return sum_over_all_positions(logits, tokens, counted, t)
    rows, columns = counted.nonzero(as_tuple=True)                                  # (masked,) each
    masked_logits = logits[rows, columns, :-1].float()                      # (masked, vocab - 1)
    error = F.cross_entropy(masked_logits, tokens[rows, columns], reduction="none")     # (masked,)
    return (error / t.float()[rows]).sum() / tokens.numel()


# ---------------------------------------------------------------- the two alignments

class _Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks, in the order of the ranks.

    Backward: every rank has a gradient for every row, since each computes the loss of the whole
    batch. A row's gradients are summed and returned to the rank that the row came from.
    """

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
        first = dist.get_rank() * ctx.rows
        return gradient[first:first + ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all ranks, (B, d) -> (world * B, d), with gradient; x itself without other ranks."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Gather.apply(x)
    return x


def contrastive_loss(image_hidden: Tensor, text_hidden: Tensor, temperature: float = 0.07,
                     symmetric: bool = True, gather: bool = True) -> Tensor:
    """Equation (3), cross-modal alignment:  L_cross = -log softmax_j( cos(h_i, h_j) / tau )_i.

    InfoNCE of mean-pooled final hidden states: each image against the texts of the global batch.
    image_hidden (B, N, D) and text_hidden (B, L, D) of the same pairs, the same B on every rank.
    symmetric: the mean of image-to-text and text-to-image, else image-to-text only. gather: False
    where only one rank computes. Every rank returns the loss of the whole batch, so the mean of the
    ranks' gradients is its gradient.
    """
    ndims = image_hidden.ndim, text_hidden.ndim
    if ndims != (3, 3) or image_hidden.shape[::2] != text_hidden.shape[::2]:
        raise ValueError(f"contrastive_loss: shapes {tuple(image_hidden.shape)} and "
                         f"{tuple(text_hidden.shape)}, expected (B, N, D) and (B, L, D)")
    with torch.autocast(image_hidden.device.type, enabled=False):
        image = image_hidden.float().mean(dim=1)                                    # (B, D)
        text = text_hidden.float().mean(dim=1)                                      # (B, D)
        if gather:
            image, text = gather_with_gradient(image), gather_with_gradient(text)   # (G, D) each
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        similarity = image @ text.T / temperature                                   # (G, G)
        pairs = torch.arange(len(similarity), device=similarity.device)
        image_to_text = F.cross_entropy(similarity, pairs)
        if not symmetric:
            return image_to_text
        return (image_to_text + F.cross_entropy(similarity.T, pairs)) / 2


def intrinsic_loss(image_mid: Tensor, teacher_image: Tensor, text_mid: Tensor,
                   teacher_text: Tensor, released: bool = False) -> Tensor:
    """Equation (4), intrinsic alignment:  L_intr = -cos(image, teacher) - cos(text, teacher).

    All (B, d). released: the released code's form, 1 - cos for each: the same gradient, a value in
    [0, 4] versus [-2, 2].
    """
    _same_shape("intrinsic_loss (image)", image_mid, teacher_image)
    _same_shape("intrinsic_loss (text)", text_mid, teacher_text)
    image = F.cosine_similarity(image_mid.float(), teacher_image.float(), dim=-1)   # (B,)
    text = F.cosine_similarity(text_mid.float(), teacher_text.float(), dim=-1)      # (B,)
    constant = 2.0 if released else 0.0
    return constant - (image + text).mean()


def total_loss(image: Tensor, text: Tensor, cross: Tensor | float = 0.0,
               intrinsic: Tensor | float = 0.0, text_weight: float = 0.2,
               cross_weight: float = 0.05, intrinsic_weight: float = 0.1) -> Tensor:
    """Equation (5):  L = L_img + 0.2 L_txt + 0.05 L_cross + 0.1 L_intrinsic."""
    return image + text_weight * text + cross_weight * cross + intrinsic_weight * intrinsic


if __name__ == "__main__":
    torch.manual_seed(0)
    x, e, v = torch.randn(3, 4, 16, 8, 8)
    ids = torch.randint(0, 39, (4, 12))
    masked, probability = torch.rand(4, 12) < 0.5, torch.full((4,), 0.5)
    logits = torch.randn(4, 12, 40)
    print("(1) flow matching", flow_matching_loss(v, e, x).item())
    print("(2) masked tokens", masked_token_loss(logits, ids, masked, probability).item())
    image_hidden, text_hidden = torch.randn(4, 16, 32), torch.randn(4, 12, 32)
    print("(3) contrastive  ", contrastive_loss(image_hidden, text_hidden).item())
    print("(4) intrinsic    ", intrinsic_loss(*torch.randn(4, 4, 32)).item())
