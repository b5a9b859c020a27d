"""Traces that were paid for, kept: a durable spool on the driver's disk, sealed into Parquet files that anyone can read.

``writer.TraceWriter`` writes, ``store.TraceStore`` reads. One driver process writes through one spool; any number of
drivers may write into one store.
"""
