"""What GPU kernels take and move, measured without a GPU, and the table that they are held to.

    promises, cases   what operators say of their kernels: units of work, compulsory bytes, wide accesses, tensor cores
    cubin, occupancy  registers, spills and instructions in the machine code, and how many blocks fit at once
    budgets           what a unit of work may cost in instructions
    measure, workers  run the cases on `emulated_cuda`: compiled for every architecture, executed on two
    records, table    the rows of ``kernels.json``
    model, choices    what a GPU would wait for, by the counts, and which backend ``auto`` takes therefore
    judge             complains where a kernel breaks a promise or got worse than its row
    report, roofline  the same for people, all of it
    page              its summary: ``KERNELS.md``

``python -m gates`` prints, checks or remakes the table; ``make gpu-report`` and ``make gpu-table`` call it.
"""
