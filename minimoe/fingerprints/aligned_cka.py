"""How much queries and keys resemble each other once the residual streams are aligned (AWM), and a repair.

What it measures
    Unbiased linear CKA, per layer, with the dimensions of the residual stream as samples. `canonicalize=False` is the
    published method: dimensions are matched, up to order and sign, by an assignment on the embeddings of shared tokens,
    and W_q^T and W_k^T are compared. The default turns one residual stream onto the other by the rotation that fits
    the embeddings of shared tokens best (orthogonal Procrustes), folds the norms, and compares W_q^T W_k.
What leaves it unchanged
    Default: every gauge, and leaving layers out; leaving heads out lowers it. Published: permutations of the residual
    stream, rotations of queries and keys.
What it cannot see
    Both: a model whose tokenizer or embedding was replaced; stolen MLPs, values and outputs. Published: copies whose
    norms were folded, residual stream rotated, or queries and keys rescaled. Trained strangers are not near 0: what
    their strongest directions do is alike.
Source
    Zeng et al. 2025, arXiv 2510.06738. Unbiased CKA: Song et al. 2012, JMLR 13; the repair is ours.

In models of more than 512 dimensions, 512 of them are the samples. The estimate is unbiased as it is with all of them;
for random weights it is off by about 1 / 512.

Shapes: H hidden size, L layers, N tokens, n dimensions that are samples: H, at most 512.
"""

import math
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from minimoe.fingerprints.anchors import mean_of_pairs, read_embedding, read_inputs, shared_tokens
from minimoe.fingerprints.folded import query_key
from minimoe.fingerprints.result import Refusal, Result, explain_refusals
from minimoe.fingerprints.weights import Weights

MOST_SAMPLES = 512  # dimensions of the residual stream, drawn with a seed


@explain_refusals
def aligned_cka(a: Weights, b: Weights, *, canonicalize: bool = True) -> Result:
    """Compare queries and keys of two models; depth, width and heads may differ.

    Args:
        canonicalize: True: our variant, which sees through rewrites; False: the method as it was published.

    Returns:
        score: the mean over paired layers, at most 1, about 0 for random weights.
        refused: the models share fewer tokens than the larger H: the alignment would be a guess.
    """
    if a.hidden_size > b.hidden_size:
        a, b = b, a  # the narrower residual stream has the samples
    tokens = shared_tokens(a, b, 4 * b.hidden_size, fewest=b.hidden_size)
    samples = torch.randperm(a.hidden_size, generator=torch.Generator().manual_seed(0))[:MOST_SAMPLES].sort().values
    if canonicalize:
        alignment = procrustes(read_inputs(b, tokens), read_inputs(a, tokens))[:, samples]
    else:
        alignment = match_dimensions(read_embedding(b, tokens), read_embedding(a, tokens)[:, samples])
    left = _read_grams(a, lambda matrix: matrix[:, samples], canonicalize)
    right = _read_grams(b, lambda matrix: matrix @ alignment, canonicalize)
    scores = (left @ right.mT).mean(0)
    score = mean_of_pairs(scores)
    if math.isnan(score):
        raise Refusal("queries or keys of a layer are 0 or not finite")
    return Result(score=score, details={"layers": min(scores.shape), "tokens": len(tokens)})


def _read_grams(weights: Weights, sample: Callable[[Tensor], Tensor], canonicalize: bool) -> Tensor:
    """The centred Gram matrices of W_q^T W_k and its transpose, or for W_q^T and W_k^T, of each layer: [2, L, n * n].

    sample: from the columns of a matrix, dimensions of the residual stream, to the n aligned ones that are the samples.
    """
    grams = []
    for layer in weights.layers_with("q"):
        q, k = query_key(weights, layer) if canonicalize else (weights.get(role, layer) for role in "qk")
        reads_q, reads_k = (sample(matrix).mT for matrix in (q, k))
        if canonicalize:  # of reads_q @ k, and of reads_k @ q
            sides = (reads_q @ (k @ k.mT) @ reads_q.mT, reads_k @ (q @ q.mT) @ reads_k.mT)
        else:
            sides = (reads_q @ reads_q.mT, reads_k @ reads_k.mT)
        grams.append(torch.stack([_centre(side) for side in sides]))
    return torch.stack(grams, dim=1)


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """The R [H, H'] with orthonormal columns that makes x R [N, H'] closest to y, for H >= H' (Schoenemann 1966)."""
    left, _, right = torch.linalg.svd((x.mT @ y).double(), full_matrices=False)
    return (left @ right).to(x)


def match_dimensions(x: Tensor, y: Tensor) -> Tensor:
    """A matrix of signs [H, H'], one a column, such that x P pairs the columns of x with those of y, by abs cosine."""
    cosine = torch.nn.functional.normalize(x, dim=0).mT @ torch.nn.functional.normalize(y, dim=0)
    rows, columns = linear_sum_assignment(cosine.abs().numpy(), maximize=True)
    matching = torch.zeros_like(cosine)
    matching[rows, columns] = cosine[rows, columns].sign()
    return matching


def cka_of_all(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Unbiased linear CKA of each x [n, p] with each y [n, q]: [len(xs), len(ys)]."""
    left, right = (torch.stack([_centre(samples @ samples.mT) for samples in group]) for group in (xs, ys))
    return left @ right.mT


def _centre(gram: Tensor) -> Tensor:
    """A Gram matrix [n, n], flat, of norm 1, centred so that products of two are unbiased.

    U-centring (Szekely & Rizzo 2014, Annals of Statistics 42): without the diagonal, all rows and columns sum to 0.
    """
    n = len(gram)
    gram = gram.double().fill_diagonal_(0)
    rows = gram.sum(0) / (n - 2)
    centred = (gram - rows - rows[:, None] + gram.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0).flatten()
    return centred / centred.norm()
