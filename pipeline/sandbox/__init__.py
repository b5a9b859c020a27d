"""Run a program that a model wrote, shut off from everything.

``run.run_sandboxed`` runs one; ``probe.probe`` says what this machine gives.

What the strict tier covers, each of it tried by the probe before the first program runs:

- files: the program sees the interpreter, its standard library and the shared libraries these need, all read-only, and one
  empty tmpfs, ``/tmp``, of bounded size; no home, no sources, no ``/proc``, no ``/sys``, of site-packages what the machine's
  owner names (``packages.py``), of ``/dev`` four harmless nodes and a copy of its input, which is itself a file in memory that
  nobody can change;
- network: a network namespace without an interface, and no call that makes a socket;
- other processes: a pid namespace of its own, killed as a whole at the deadline and when the program ends;
- identity: an unprivileged uid, inside and (when started as root) outside; no capability; no_new_privs; nothing setuid in
  sight;
- the kernel: a list of about 160 system calls (``seccomp.py``), Landlock on top where the kernel has it;
- resources: wall clock, CPU time, memory of a process and of all together, processes and threads, file size, open files,
  number of files, output;
- the environment: two variables of ours (and LD_LIBRARY_PATH where the interpreter does not start without it; four for
  packages).

What it does not cover: a bug in the kernel itself, behind the calls that are allowed; what can be learnt from timing and from
the load of the machine; the machine's host name is hidden, its kernel release and CPU are not; two programs that run at the
same time can signal each other by locks on the library's files. Two weaker tiers exist for machines that forbid namespaces, and
are used only when their name, which begins with ``unsafe``, is given: as an argument, or as the environment variable
``STILLHOUSE_SANDBOX`` (``choice.py``), which may name a service over HTTP as well (``service.py``).
"""
