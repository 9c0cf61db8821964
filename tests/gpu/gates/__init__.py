"""What GPU kernels take and move, measured without a GPU, and the table that they are held to.

    promises, cases   what operators say about their kernels: bytes that are compulsory, 16-byte accesses, tensor cores
    cubin, occupancy  registers, spills and instructions in the machine code, and how many blocks fit at once
    measure           runs the cases on `emulated_cuda`: compiled for every architecture, executed on two
    records, table    the rows of ``kernels.json``
    judge             complains where a kernel breaks a promise or got worse than its row
    report, roofline  the same for people, all of it
    page              its summary: ``KERNELS.md``

``python -m gates`` prints, checks or remakes the table; ``make gpu-report`` and ``make gpu-table`` call it.
"""
