"""What no implementation can beat: the bytes an op must move and the operations the matrix unit must do.

Each input is read once (twice for both passes) and each output written once. Small tensors (per head, per channel) are
left out.
"""

FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
SCAN_TILE = 64  # tokens: the smallest chunk that fills Hopper's matrix unit


def floor_ms(cost, ceilings):
    """Milliseconds under which no implementation can run, from (bytes, operations) and the measured rates."""
    return 1e3 * max(cost[0] / ceilings["bytes_per_s"], cost[1] / ceilings["flop_per_s"])


def scan_cost(batch, length, heads, head_dim, state, x_heads, b_heads, c_heads, size=2):
    """SSD scan: pass -> (bytes, operations), by the chunked algorithm with chunks of SCAN_TILE tokens."""
    tokens = batch * length
    y, x = tokens * heads * head_dim, tokens * x_heads * head_dim
    inputs = x + tokens * (b_heads + c_heads) * state + tokens * heads
    moved = {FORWARD: inputs + y, BOTH: inputs + y + inputs + y + inputs}

    tile = 2 * SCAN_TILE
    step = 2 * state * head_dim  # of one token and head: into the state, or out of it
    scores = tokens * max(b_heads, c_heads) * tile * state  # C B^T, or one of its gradients
    forward = scores + tokens * heads * (tile * head_dim + 2 * step)
    backward = 3 * scores + tokens * heads * (2 * tile * head_dim + 4 * step)
    return {FORWARD: (size * moved[FORWARD], forward), BOTH: (size * moved[BOTH], forward + backward)}


def step_cost(batch, heads, head_dim, state, x_heads, b_heads, c_heads, state_size, size=2):
    """One decoding step: the state is read and written."""
    small = heads * head_dim + x_heads * head_dim + (b_heads + c_heads) * state + heads
    return {STEP: (batch * (2 * state_size * heads * head_dim * state + size * small), 0)}


def delta_cost(batch, length, heads, head_dim, state, keys, size=2):
    """Gated delta rule: pass -> (bytes, operations), by the chunked algorithm with chunks of SCAN_TILE tokens.

    keys: heads of q and k. The inverse of the triangular systems is left out: it can do without the matrix unit.
    """
    tokens = batch * length
    y = tokens * heads * head_dim
    inputs = y + tokens * 2 * keys * state
    decays = 4 * tokens * 2 * heads  # g and beta, in float32
    tile = 2 * SCAN_TILE
    step = 2 * state * head_dim  # of one token and head: into a state, or out of it
    scores = tokens * keys * tile * state  # q k^T, k k^T, or a product with the gradient of one
    forward = 2 * scores + tokens * heads * (2 * tile * head_dim + 3 * step)
    backward = 5 * scores + tokens * heads * (4 * tile * head_dim + 6 * step)
    return {
        FORWARD: (size * (inputs + y) + decays, forward),
        BOTH: (size * (3 * inputs + 2 * y) + 3 * decays, forward + backward),
    }


def selective_cost(batch, length, channels, state, groups, size=2):
    """Selective scan: pass -> (bytes, operations). None of its operations is one of the matrix unit."""
    tokens = batch * length
    inputs = tokens * 2 * (channels + groups * state)  # x, dt, B and C
    y = tokens * channels
    return {FORWARD: (size * (inputs + y), 0), BOTH: (size * (3 * inputs + 2 * y), 0)}


def elementwise_cost(numel, inputs, size=2):
    """y = f(inputs), all of one shape; backward reads inputs and dy and writes the gradients of the inputs."""
    return {FORWARD: (size * numel * (inputs + 1), 0), BOTH: (size * numel * (3 * inputs + 2), 0)}


def distance_cost(batch, length, heads, head_dim, state, kv, size=2):
    """Matching of mixing matrices, forward and backward: both matrices are made twice, their lower halves only."""
    entries = batch * heads * length**2 / 2
    reads = batch * length * (heads + kv) * (head_dim + state) + batch * length * heads
    writes = batch * length * ((heads + kv) * state + heads)
    return {BOTH: (size * (2 * reads + writes), 2 * entries * (2 * (head_dim + state) + 2 * state))}


def kl_cost(tokens, student, teacher, vocab, size=2):
    """KL from hidden states: two products for the logits and two for the student's gradients."""
    moved = 2 * (tokens + vocab) * student + (tokens + vocab) * teacher
    return {BOTH: (size * moved, 2 * tokens * vocab * (3 * student + teacher))}
