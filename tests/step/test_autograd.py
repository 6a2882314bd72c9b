"""What autograd records of operations that lead nowhere: nothing, but their graph lives as long as a variable does."""

from mstplan.step.autograd import record_part_tape
from mstplan.step.tape import ForGradients, Rules, TapeWriter, Weight, backward, forward

SIZE = 2 * 8


def write(holds: bool = True):
    """x is multiplied by a weight and split in two, of which one part is cubed for nobody and the other given out."""
    tape = TapeWriter({"d": 8})
    x = tape.new("x", "b s d", "bfloat16")
    tape.sources.append(x)
    weight, other = Weight("w", (8, 8)), Weight("v", (8, 8))
    both = tape.new("both", "b s 16", "bfloat16")
    tape.op(
        "product", [x], both, for_gradients=ForGradients(((x, weight),)), grads=((x, tape.grad(x)),), weights=(weight,)
    )
    one, two = tape.view(both, "one", "b s d"), tape.view(both, "two", "b s d")
    tape.op("split", [both], one, two, grads=((both, tape.grad(both)),), joins_gradients=True)
    cube = tape.new("cube", "b s d", "bfloat16")
    tape.op("cube", [one], cube, keeps=(one,), grads=((one, tape.grad(one)),))
    lost = tape.new("lost", "b s d", "bfloat16")
    tape.op(
        "lost",
        [cube],
        lost,
        for_gradients=ForGradients(((cube, other),)),
        grads=((cube, tape.grad(cube)),),
        weights=(other,),
    )
    y = tape.new("y", "b s d", "bfloat16")
    tape.op("sine", [two], y, keeps=(two,), grads=((two, tape.grad(two)),))
    if holds:
        tape.hold(lost)
    return tape.build_tape(), x


def recorded(holds: bool = True):
    tape, x = write(holds)
    return {op.name: op for op in record_part_tape(tape, frozenset((x,))).ops}


def test_what_leads_nowhere_keeps_nothing_and_trains_nothing():
    ops = recorded()
    assert not any(ops[name].keeps or ops[name].grads or ops[name].weights for name in ("cube", "lost"))
    assert ops["product"].trained and ops["sine"].keeps


def test_its_graph_goes_with_the_variable_that_holds_it():
    assert [t.name for t in recorded()["sine"].graph_holds] == ["one", "cube"]
    assert not recorded(holds=False)["sine"].graph_holds


def test_zeros_stand_in_for_the_gradient_that_never_comes():
    zeros = recorded()["split"].back_temps
    assert [(t.name, t.bytes) for t in zeros] == [("zeros for the gradient of one", SIZE)]


def test_the_bytes_of_a_replay():
    tape, x = write()
    rules = Rules(every_moment=True)
    moments = {
        m.operation: m.live[1] for m in forward(record_part_tape(tape, frozenset((x,))), rules, keep=True).moments
    }
    assert moments["sine"] == 2 * SIZE + 3 * SIZE  # both; cube, lost and y
    moments = {m.operation: m.live[1] for m in backward(record_part_tape(tape, frozenset((x,))), rules).moments}
    assert "backward of cube" not in moments
    gone = SIZE + 2 * SIZE  # the incoming gradient; both, of which sine kept a part
    assert moments["backward of split"] == SIZE - gone + 2 * SIZE + SIZE  # of two; both's gradient, zeros for one's
