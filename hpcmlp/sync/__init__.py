"""Keep the replicas of all ranks equal: joins the mathematics and the communication."""
