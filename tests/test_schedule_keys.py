"""The cache of schedules: whatever two node lists of one key are, they have one schedule, field by field."""
import dataclasses
import random

from transformer_experiments.tracing.nodes import Node, Ref
from transformer_experiments.tracing.schedule import make_schedule, schedule_key

OPS = ('torch.Tensor.add_', 'torch.Tensor.view', 'torch.broadcast_tensors', 'operator.getitem', 'operator.setitem',
       'torch.zeros', 'torch.Tensor.zero_', 'torch.nn.functional.relu', 'torch.add', 'operator.iadd', 'update', 'grad',
       'torch.Tensor.sum',
       'torch.Tensor.backward', 'log', 'same', 'torch.Tensor.clone', 'torch.split')


def random_nodes(rng: random.Random) -> list[Node]:
    second = 'h', rng.choice(['input', 'output']), 'all', None
    nodes = [Node(0, 'site', ('h', 'output', 0, None)), Node(1, 'site', second)]
    for id in range(2, rng.randrange(4, 12)):
        op, refs = rng.choice(OPS), [Ref(rng.randrange(id)) for _ in range(3)]
        constant = rng.choice([0, 1, 'a', (slice(None), 0), None])
        own = dict(update=(refs[0], refs[1]), grad=(refs[0], rng.randrange(2)), same=(refs[0],), log=(refs[0],))
        args = own.get(op)
        if args is None:
            args = tuple(rng.choice([*refs, constant]) for _ in range(rng.randrange(1, 4)))
        if op.startswith('operator.') and type(args[0]) is not Ref:
            args = refs[0], *args[1:]
        kwargs = {}
        if op.startswith('torch.') and rng.random() < 0.4 and len(args) > 1:
            kwargs = {rng.choice(['x', 'inplace', 'dim']): rng.choice([args[-1], True, False])}
            args = args[:-1]
        node = Node(id, op, args, kwargs)
        if rng.random() < 0.3:
            node.save, node.saved_at = f's{id}', id
        nodes.append(node)
    return nodes


def altered(nodes: list[Node], rng: random.Random) -> list[Node]:
    "The same list with one thing changed, which the key may or may not hold."
    new = [Node(n.id, n.op, n.args, dict(n.kwargs), save=n.save) for n in nodes]
    for n, old in zip(new, nodes, strict=True):
        n.saved_at = old.saved_at
    n = new[rng.randrange(2, len(new))]
    how = rng.choice(['constant', 'to keyword', 'swap', 'flag'])
    args = list(n.args)
    if how == 'constant' and n.op not in ('grad', 'site'):
        args = [rng.choice([7, 'b']) if not isinstance(a, Ref) else a for a in args]
    elif how == 'to keyword' and len(args) > 1 and n.op.startswith('torch.'):
        n.kwargs = n.kwargs | {'x': args.pop()}
    elif how == 'swap' and len(args) > 1 and n.op not in ('grad',):
        args[0], args[-1] = args[-1], args[0]
    elif how == 'flag' and n.kwargs:
        n.kwargs = {k: (not v if isinstance(v, bool) else v) for k, v in n.kwargs.items()}
    n.args = tuple(args)
    return new


def schedule(nodes):
    try:
        found = make_schedule(nodes)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        return type(e).__name__
    return {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}


def test_equal_keys_have_equal_schedules():
    rng, equal = random.Random(0), 0
    for _ in range(4000):
        nodes = random_nodes(rng)
        other = altered(nodes, rng)
        if schedule_key(nodes) != schedule_key(other): continue
        equal += 1
        a, b = schedule(nodes), schedule(other)
        assert a == b, (nodes, other, [k for k in a if a[k] != b[k]] if isinstance(a, dict) else (a, b))
    assert equal > 500


def test_a_reference_that_moves_into_a_keyword_is_another_key():
    "A job of one key once made the schedule of another's, and turned a sum of 250.6 into 0."
    def nodes(args, kwargs):
        return [Node(0, 'site', ('a', 'output', 0, None)), Node(1, 'site', ('b', 'output', 0, None)),
                Node(2, 'torch.broadcast_tensors', args, kwargs), Node(3, 'operator.getitem', (Ref(2), 0)),
                Node(4, 'torch.Tensor.zero_', (Ref(3),)), Node(5, 'torch.Tensor.sum', (Ref(0),), save='sum')]
    assert schedule_key(nodes((Ref(0), Ref(1)), {})) != schedule_key(nodes((Ref(0),), {'x': Ref(1)}))
